"""A size that no bucket has is planned as it would be trained."""

from __future__ import annotations

import pytest

from whitetuner import plan_view
from whitetuner.memory.machine import typical_machine
from whitetuner.records import Size


@pytest.mark.slow
def test_a_size_between_two_is_planned_as_it_is_trained() -> None:
    """Buckets are multiples of the model's stride, and the page asks with whatever resolution was typed."""
    found = plan_view.of_family("flux2-klein", Size(79, 65), None, [typical_machine(12, 32)])
    assert found["shape"].startswith("64x64")
