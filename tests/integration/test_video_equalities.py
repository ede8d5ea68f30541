"""E5, E6, E8 and E9 through whole runs of every WAN, each expert by itself and both: no memory option, no interruption and no
cache changes a bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.data.samples import make_testdata
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.families.contract import quiet
from whitetuner.memory.build import Build
from whitetuner.prepared import encoded_twice
from whitetuner.records import Size
from whitetuner.resolve import open_family
from whitetuner.selftest import Bench
from whitetuner.tiny import tiny_values

pytestmark = pytest.mark.slow

#: (variant, task, expert)
CASES = [
    ("i2v-2.1", "i2v", "both"),
    ("i2v-2.2", "i2v", "both"),
    ("i2v-2.2", "i2v", "high"),
    ("i2v-2.2", "i2v", "low"),
    ("t2v-2.1", "t2v", "both"),
    ("ti2v-5b", "i2v", "both"),
    ("ti2v-5b", "t2v", "both"),
]
STEPS = 4
MEMORY: dict[str, dict[str, Any]] = {
    "swapped": {"memory.blocks_to_swap": 2},
    "swapped, recomputed, inputs on the host": {
        "memory.blocks_to_swap": 1,
        "memory.gradient_checkpointing": True,
        "memory.activation_offload": True,
    },
    "planned for a small card": {"memory.vram_gb": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("equalities")
    with quiet():
        for variant in {one for one, _, _ in CASES}:
            registry.make_tiny("wan", str(folder / variant), variant)
    make_testdata("video", folder / "data", 3, 0)
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("variant", "task", "expert"), CASES, ids=["-".join(one) for one in CASES])
def test_nothing_but_the_config_decides_what_is_learned(
    models: Path, tmp_path: Path, variant: str, task: str, expert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in ("train.team", "memory.beside"):  # without a plan, and with one
        monkeypatch.setattr(f"whitetuner.{home}.TURN_STEPS", 1)
    values = {
        **tiny_values("wan", models / variant, models / "data", tmp_path, task),
        "data.clips": "random",
        "data.cache_dir": str(models / f"cache-{variant}-{task}"),
        "run.steps": STEPS,
        "save.every": 2,
        "preview.every": 0,
        "validation.every": 2,
    }
    if expert != "both":
        values["model.options.expert"] = expert

    def run(name: str, resume: str | None = None, **more: Any) -> tuple[str, list[tuple[Any, ...]]]:
        done = recipe.run(load_config(None, base={**values, "run.name": name, **more}), resume=resume)
        return digest(checkpoint(done.folder, done.step)), losses(done.folder)

    plain = run("plain")
    for number, (title, options) in enumerate(MEMORY.items()):
        assert run(f"memory-{number}", **options) == plain, title
    assert run("cut", **{"run.steps": 2}) != plain
    assert run("cut", resume="latest", **MEMORY["swapped"]) == plain, "resumed with other memory options"
    config = load_config(None, base={**values, "run.name": "twice"}).config
    cached, live = encoded_twice(config, open_family(config), Build())
    assert cached.keys() == live.keys() and all(torch.equal(cached[name], live[name]) for name in live)


def test_selftest_knows_videos(tmp_path: Path) -> None:
    """Its rows over clips; E1 with its mutants and the rows that hang on no family are proved elsewhere, and take a minute."""
    bench = Bench("wan", tmp_path)
    rows = (
        bench.one_config,
        bench.encoders,
        bench.accumulation,
        bench.quantised_base,
        bench.swapped,
        bench.cached_is_live,
    )
    assert [row.__name__ for row in rows if not row()[0]] == []
    assert bench.task == "i2v" and bench.case().condition_sizes == (Size(64, 96, 1),)
