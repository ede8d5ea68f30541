"""Every family of the registry in every task and variant that it has to prove, as a random tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from subjects import Subject

from whitetuner.families import registry
from whitetuner.families.contract import quiet


@pytest.fixture(
    scope="session",
    params=[(name, *pair) for name in registry.FAMILIES for pair in registry.spec(name).pairs()],
    ids=lambda param: "-".join(param),
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    name, variant, task = request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    folder = tmp_path_factory.mktemp(name) / "model"
    with quiet():
        registry.make_tiny(name, str(folder), variant)
        yield Subject(name, task, folder, variant)
    torch.set_num_threads(threads)
