"""Micro-batches inside the blocks of every family: the gradients of the whole batch, each block called a sample at a time."""

from __future__ import annotations

import pytest
import torch
from subjects import CAPTIONS, Subject

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.errors import UserError
from whitetuner.evidence import gradients
from whitetuner.memory.build import Build
from whitetuner.memory.micro import micro_batches
from whitetuner.memory.recompute import checkpoint_blocks

#: 2511 sees its references as free of noise by a second row of times for each sample; GLM-Image's given pictures are remembered
#: for a whole batch (where captions differ in length its samples go one by one anyway).
REFUSED = {("qwen-image", "edit-2511", 2), ("qwen-image", "edit-2511", 3), ("glm-image", "edit", 3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "captions", [CAPTIONS[:2], (CAPTIONS[0], CAPTIONS[0], CAPTIONS[2])], ids=["two", "three"]
)
def test_samples_one_by_one_are_the_whole_batch(subject: Subject, captions: tuple[str, ...]) -> None:
    family = subject.family
    part = subject.spec.parts(family.options)[0]
    module = family.load(Build())[part.name]
    adapter = attach(
        module, choose(module, subject.spec.adapter_targets), AdapterSettings("lora", rank=2), seed=0
    )
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    batch = subject.bench.batch(subject.case(*captions, columns=6, seed=1).inputs())
    assert len(batch) == len(captions)

    def computed(samples: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        micro = micro_batches(samples, part.per_sample, part.name)
        recompute = checkpoint_blocks(module, part.block_lists, micro=micro)
        found = gradients(family, part.name, module, adapter, [batch], seed=1)
        recompute.remove()
        return found, recompute.runs

    whole, once = computed(0)
    if (subject.name, subject.variant or subject.task, len(batch)) in REFUSED:
        with pytest.raises(UserError, match="cannot be cut by samples"):
            computed(1)
        return
    pieces, runs = computed(1)
    norm = sum(float(one.square().sum()) for one in whole.values()) ** 0.5
    error = sum(float((pieces[key] - whole[key]).square().sum()) for key in whole) ** 0.5
    assert whole.keys() == pieces.keys() and error / norm < 1e-5
    # A family may itself ask its blocks a sample at a time (texts of other lengths): never in larger pieces than samples.
    assert all(few <= many <= few * len(batch) for few, many in zip(once, runs, strict=True))
    assert len(captions) != 3 or sum(runs) > sum(once) or sum(once) >= 2 * len(batch) * len(once)
