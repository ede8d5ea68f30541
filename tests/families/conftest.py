"""Every family of the registry in every task and variant that it has to prove, as a random tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from subjects import Subject

from whitetuner.families import registry
from whitetuner.families.contract import quiet


def cases() -> list[Any]:
    """(family, variant, task). What a family has beyond its first, the first family aside, is left to the slow part."""
    found = []
    for name in registry.FAMILIES:
        for number, pair in enumerate(registry.spec(name).pairs()):
            marks = [pytest.mark.slow] if number and name != "flux2-klein" else []
            found.append(pytest.param((name, *pair), marks=marks, id="-".join((name, *pair))))
    return found


@pytest.fixture(scope="session", params=cases())
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    name, variant, task = request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    folder = tmp_path_factory.mktemp(name) / "model"
    with quiet():
        registry.make_tiny(name, str(folder), variant)
        yield Subject(name, task, folder, variant)
    torch.set_num_threads(threads)
