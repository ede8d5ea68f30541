"""The workflow beside a finished run: whole, for everything that ComfyUI knows, with the trained file in it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from whitetuner.families import registry
from whitetuner.families.comfy_workflows import Wanted, workflow
from whitetuner.records import Size

KNOWN = ("flux2-klein", "zimage", "qwen-image", "wan")
CASES = [
    (name, variant, task)
    for name in KNOWN
    for variant in registry.spec(name).variants
    for task in registry.spec(name).tasks_of(variant)
]


def wanted(name: str, variant: str, task: str, adapter: bool) -> Wanted:
    experts = variant in ("i2v-2.2", "t2v-2.2")
    return Wanted(
        family=name,
        variant=variant,
        task=task,
        trained={
            "transformer": "high.safetensors",
            **({"transformer_2": "low.safetensors"} if experts else {}),
        },
        adapter=adapter,
        prompt="a 猫",
        negative="",
        size=Size(64, 96, 5 if name == "wan" else 1),
        steps=20,
        cfg=4.0,
        seed=7,
        shift=5.0,
        references=0 if task in ("t2i", "t2v") else 2,
    )


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize(("name", "variant", "task"), CASES)
def test_every_link_leads_to_a_node_and_the_trained_files_are_in_it(
    name: str, variant: str, task: str, adapter: bool
) -> None:
    case = wanted(name, variant, task, adapter)
    made = workflow(case)
    assert made is not None and json.loads(json.dumps(made)) == made
    links = [value for node in made.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert all(source in made and isinstance(slot, int) for source, slot in links)
    used = {source for source, _ in links}
    ends = [node["class_type"] for number, node in made.items() if number not in used]
    assert ends == (["SaveVideo"] if name == "wan" else ["SaveImage"]), "nothing hangs loose"
    key = "lora_name" if adapter else "unet_name"
    files = [node["inputs"][key] for node in made.values() if key in node["inputs"]]
    assert files == list(case.trained.values())
    given = sum(node["class_type"] == "LoadImage" for node in made.values())
    assert (given > 0) == (case.references > 0) and given <= case.references
    texts: list[Any] = [node["inputs"].get("text", node["inputs"].get("prompt")) for node in made.values()]
    assert "a 猫" in texts


def test_experts_change_where_the_noise_level_falls_to_their_boundary() -> None:
    made = workflow(wanted("wan", "i2v-2.2", "i2v", True)) or {}
    steps = [node["inputs"] for node in made.values() if node["class_type"] == "KSamplerAdvanced"]
    # sigma = 5 u / (1 + 4 u) is 0.9 at u = 0.643: 7 of 20 steps are above
    assert steps[0]["end_at_step"] == steps[1]["start_at_step"] == 7


def test_models_that_comfyui_does_not_have_get_none() -> None:
    assert workflow(wanted("glm-image", "t2i", "t2i", True)) is None
    assert workflow(wanted("zimage-v2", "base", "t2i", True)) is None
