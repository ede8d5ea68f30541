"""`whitetuner selftest`: the equalities of the project, proved on this machine. Two hashes side by side where bits must agree.

Everything runs on a random tiny model of the family: what is proved is the arithmetic, which does not know the size.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whitetuner import memory_proofs
from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.files import load_adapter
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.checkpoint.export import export_adapter
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.samples import make_testdata
from whitetuner.errors import EXIT_FAILED
from whitetuner.evidence import begins_as, checkpoint, digest, gradients, losses, start_training
from whitetuner.families import contract, registry
from whitetuner.family import Family, ModelPaths
from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.build import build_module
from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.records import Batch, Size
from whitetuner.runs import events
from whitetuner.tiny import TINY_SIZE_PX, tiny_options, tiny_values

#: What is said of each equality (design: README, docs/selftest.md).
TITLES = {
    "E1": "one Euler step is the pipeline's",
    "E2": "text and latents are the pipeline's",
    "E3": "factored adapters are F.linear(x, W + delta)",
    "E4": "gradients pass a quantised base as its dequantised weights",
    "E5": "block swap on is off",
    "E6": "two accumulated passes are one batch of two; recompute changes no bit",
    "E7": "two ranks, swap on, are two accumulated batches of one",
    "E8": "killed and resumed is never interrupted",
    "E9": "cached is live",
    "E10": "exported and read back is the same delta",
    "E11": "what is converted while it loads begins as what it was",
    "E12": "form, file and command line are one config",
}
#: Rows that hang on no family: with several they are proved over the first one. `selftest FAMILY` has them all.
ONCE = ("E12", "E3", "E7", "E8")


@dataclass(frozen=True)
class Row:
    """One line of the table. left, right: what was compared (hashes, or error and bound)."""

    equality: str
    family: str
    ok: bool
    left: str
    right: str
    seconds: float


def run(family: str | None, *, as_json: bool = False) -> int:
    """Prints the table; 0 when every row holds, 1 when one does not."""
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    names = list(registry.FAMILIES) if family is None else [registry.spec(family).name]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="whitetuner-selftest-") as folder:
        for name in names:
            for row in prove(name, Path(folder) / name, whole=name == names[0]):
                rows.append(row)
                if not as_json:
                    mark = "ok  " if row.ok else "FAIL"
                    print(
                        f"{mark} {row.equality:<4}{row.family:<13}{TITLES[row.equality]:<70} "
                        f"{row.left:>20}  {row.right:<20} {row.seconds:5.1f} s",
                        flush=True,
                    )
    failed = [row for row in rows if not row.ok]
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "ok": not failed}, indent=1))
    else:
        print(
            f"{len(rows) - len(failed)} of {len(rows)} hold" + ("" if not failed else f", {len(failed)} FAIL")
        )
    return EXIT_FAILED if failed else 0


def prove(name: str, folder: Path, whole: bool = True) -> Iterator[Row]:
    """All rows of a family, one after the other; without `whole` those that no family can change are left out."""
    bench = Bench(name, folder)
    checks: dict[str, Callable[[], tuple[bool, str, str]]] = {
        "E12": bench.one_config,
        "E1": bench.euler_step,
        "E2": bench.encoders,
        "E3": bench.adapters,
        "E10": bench.round_trip,
        "E6": bench.accumulation,
        "E4": bench.quantised_base,
        "E5": bench.swapped,
        "E9": bench.cached_is_live,
        "E7": bench.two_ranks,
        "E8": bench.killed_and_resumed,
    }
    if bench.spec.converts:
        checks["E11"] = bench.converted
    for equality, check in checks.items():
        if equality in ONCE and not whole:
            continue
        began = time.perf_counter()
        ok, left, right = check()
        yield Row(equality, name, ok, left, right, time.perf_counter() - began)


class Bench:
    """A tiny model of a family, a tiny data set and a config over both."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.spec = name, folder, registry.spec(name)
        self.model, self.data = folder / "model", folder / "data"
        folder.mkdir(parents=True, exist_ok=True)
        with contract.quiet():
            registry.make_tiny(name, str(self.model))
        self.task = self.tasks()[0]
        make_testdata("video" if self.spec.frames else "t2i", self.data, 5, 0)
        self.options = self.spec.options(**tiny_options(name))
        self.build = partial(build_module, dtype=torch.float32, device=torch.device("cpu"))

    def family(self) -> Family:
        return registry.load(self.name, self.options, ModelPaths(self.model))

    def reference(self) -> tuple[Any, Any]:
        return registry.reference(self.name, self.model, self.options), registry.mutants(self.name)

    def values(self, **more: Any) -> dict[str, Any]:
        return {**tiny_values(self.name, self.model, self.data, self.folder, self.task), **more}

    # -- the checks ------------------------------------------------------------------------------------------------

    def one_config(self) -> tuple[bool, str, str]:
        values = self.values(**{"optimizer.lr": 3e-4})
        form = load_config(None, base=values).config
        path = self.folder / "form.toml"
        path.write_text(dump_config(form), encoding="utf-8")
        file = load_config(path).config
        line = load_config(None, base=self.values(), overrides=["optimizer.lr=3e-4"]).config
        hashes = [short(config.model_dump_json().encode()) for config in (form, file, line)]
        return len(set(hashes)) == 1, hashes[0], "/".join(sorted(set(hashes[1:])))

    def case(self, task: str = "") -> contract.Case:
        side, frames = TINY_SIZE_PX, self.spec.frames
        size = Size(side, side + 32, 2 * frames + 1 if frames else 1)
        given = {"edit": (Size(side + 32, side), Size(side, side)), "i2v": (size._replace(frames=1),)}
        captions = ("a red circle", "two blue birds on a wire")
        return contract.Case(captions, size, condition_sizes=given.get(task or self.task, ()))

    def tasks(self) -> list[str]:
        """Those that the tiny model, of the first variant, is for."""
        return list(self.spec.tasks_of(next(iter(self.spec.variants))))

    def euler_step(self) -> tuple[bool, str, str]:
        """The right family passes and every wrong one fails, or the check proves nothing."""
        with contract.quiet():
            reference, mutants = self.reference()
            tasks = self.tasks()
            error = max(
                contract.euler_step_error(
                    contract.Bench(self.family(), self.build, task), reference, self.case(task)
                )
                for task in tasks
            )
            # A convention of all tasks is tried in the first alone, one of some tasks in those.
            caught = [
                contract.told(one, self.family(), self.build, reference, self.case(task), task)
                for one in mutants.values()
                for task in (one.tasks or tasks[:1])
                if task in tasks
            ]
        told = f"{error:.1e} < {contract.E1_TOLERANCE:.0e}"
        return (
            error < contract.E1_TOLERANCE and all(caught),
            told,
            f"{sum(caught)}/{len(caught)} mutants told",
        )

    def encoders(self) -> tuple[bool, str, str]:
        with contract.quiet():
            reference, _ = self.reference()
            task = self.tasks()[-1]  # an edit task's encoders say all that those of t2i say, and more
            bench = contract.Bench(self.family(), self.build, task)
            ours, theirs = {}, {}
            worst = 0.0
            for index, given in enumerate(self.case(task).inputs()):
                worst = max(worst, *contract.encoder_errors(bench, reference, given).values())
                ours.update({f"{index}{name}": tensor for name, tensor in bench.encode(given).items()})
                theirs.update({f"{index}{name}": tensor for name, tensor in reference.encode(given).items()})
        return worst <= contract.E2_TOLERANCE, digest(ours), digest(theirs)

    def adapters(self) -> tuple[bool, str, str]:
        worst = 0.0
        for settings in (
            AdapterSettings("lokr", factor=4, full_matrix=True),
            AdapterSettings("lokr", rank=2, alpha=1.0, factor=4),
            AdapterSettings("lora", rank=4, alpha=8.0),
        ):
            generator = torch.Generator().manual_seed(1)
            plain = torch.nn.Linear(32, 48, dtype=torch.float64)
            holder = torch.nn.ModuleDict({"layer": plain})
            adapter = attach(holder, ["layer"], settings, seed=0)
            for delta in adapter.deltas.values():
                delta.double()
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            x = torch.randn(7, 32, generator=generator, dtype=torch.float64)
            weight = plain.weight + adapter.deltas["layer"].weight()
            with torch.no_grad():
                expected = torch.nn.functional.linear(x, weight, plain.bias)
                worst = max(worst, float((holder["layer"](x) - expected).abs().max() / expected.abs().max()))
        return worst < 1e-12, f"{worst:.1e}", "< 1e-12"

    def round_trip(self) -> tuple[bool, str, str]:
        family = self.family()
        part = self.spec.parts(family.options)[0].name
        module = family.load(self.build)[part]
        settings = AdapterSettings("lokr", factor=4, full_matrix=True)
        adapter = attach(module, choose(module, self.spec.adapter_targets), settings, seed=0)
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                parameter.normal_(generator=torch.Generator().manual_seed(index))
        before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        hashes = []
        for naming in ("comfyui", "diffusers", "lycoris"):
            path = self.folder / f"{naming}.safetensors"
            export_adapter(before, settings, family.keys, path=path, naming=naming)
            hashes.append(digest(load_adapter(path, family.keys)[1]))
        return set(hashes) == {digest(before)}, digest(before), "/".join(sorted(set(hashes)))

    def converted(self) -> tuple[bool, str, str]:
        """Z-Image V2, given a folder of Z-Image."""
        source = next(
            name for name in registry.FAMILIES if registry.spec(name).transformer_class in self.spec.converts
        )
        folder = self.folder / "converted"
        with contract.quiet():
            registry.make_tiny(source, str(folder))
            options = registry.spec(source).options(**tiny_options(source))
            theirs = registry.load(source, options, ModelPaths(folder))
            ours = registry.load(self.name, self.options, ModelPaths(folder))
            batch = contract.Bench(theirs, self.build, "t2i").batch(self.case().inputs())
            error, tensors, seen = begins_as(ours, self.build, theirs, batch, tolerance=contract.E1_TOLERANCE)
        told = f"{error:.1e} < {contract.E1_TOLERANCE:.0e}"
        return error < contract.E1_TOLERANCE and seen == tensors, told, f"{seen}/{tensors} changes told"

    def accumulation(self) -> tuple[bool, str, str]:
        """A batch of two is the mean of its two singles within rounding; recompute must not change a bit."""
        family = self.family()
        part = self.spec.parts(family.options)[0].name
        module = family.load(self.build)[part]
        adapter = attach(
            module, choose(module, self.spec.adapter_targets), AdapterSettings("lora", rank=2), seed=0
        )
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
        bench = contract.Bench(family, self.build, self.task)
        inputs = self.case().inputs()
        both, singles = bench.batch(inputs), [bench.batch([one]) for one in inputs]
        singles = [Batch((item,), (0,), one.fields) for item, one in zip(both.items, singles)]
        ask = partial(gradients, family, part, module, adapter, seed=1)
        one, two = ask(batches=[both]), ask(batches=singles)
        # Of the whole gradient. Of one tensor rounding takes up to ten times that where sums over tokens cancel (seen: 1.5e-5,
        # by the processor's kernels), and what hardly has a gradient (WAN's keys of padded text) is held to a thousandth of
        # the whole; a sample that counted wrongly would be off by a hundredth and more.
        whole = sum(float(one[k].square().sum()) for k in one) ** 0.5
        error = sum(float((one[k] - two[k]).square().sum()) for k in one) ** 0.5 / whole
        worst = max(float((one[k] - two[k]).norm()) / max(float(one[k].norm()), 1e-3 * whole) for k in one)
        checkpoint_blocks(module, self.spec.parts(family.options)[0].block_lists)
        again = digest(ask(batches=[both])) == digest(one)
        return (
            error < 1e-5 and worst < 1e-4 and again,
            f"{error:.1e} < 1e-05",
            "recompute: " + ("bits equal" if again else "BITS DIFFER"),
        )

    def quantised_base(self) -> tuple[bool, str, str]:
        family = self.family()
        return memory_proofs.quantised_base(family, self.spec.parts(family.options)[0])

    def swapped(self) -> tuple[bool, str, str]:
        family = self.family()
        part = self.spec.parts(family.options)[0]
        count = len(blocks_of(family.load(self.build)[part.name], part.block_lists))
        return memory_proofs.swapped(self.values(), count)

    def cached_is_live(self) -> tuple[bool, str, str]:
        from whitetuner.prepared import encoded_twice

        cached, live = encoded_twice(load_config(None, base=self.values()).config, self.family(), self.build)
        return digest(cached) == digest(live), digest(cached), digest(live)

    def two_ranks(self) -> tuple[bool, str, str]:
        """Two processes with an uneven share of the samples each and their weights in shared memory, and one with both."""
        from whitetuner import recipe

        steps, swap = 4, {"memory.blocks_to_swap": 1}
        values = self.values(**{"run.steps": steps, "save.every": steps, "data.batch_size": 2})
        config = self.folder / "ranks.toml"
        several = load_config(None, base={**values, **swap, "run.name": "ranks"}).config
        config.write_text(dump_config(several), encoding="utf-8")
        start_training(config, "--gpus", "cpu,cpu").wait()
        more = {"run.name": "one-rank", "optimizer.gradient_accumulation": 2}
        one = recipe.run(load_config(None, base={**values, **more}))
        left, right = (
            digest(checkpoint(folder, steps)) for folder in (one.folder, one.folder.with_name("ranks"))
        )
        same = losses(one.folder) == losses(one.folder.with_name("ranks"))
        return left == right and same, left, right if same else f"{right} LOSSES DIFFER"

    def killed_and_resumed(self) -> tuple[bool, str, str]:
        """A process is killed with -9 in the middle, another goes on; against a run that was left alone. Hashes: adapter+full.

        What is killed starts cold, which takes longer than all its steps: both start while this process trains.
        """
        from whitetuner import recipe

        full = {"method.kind": "full", "method.precision": "bf16_stochastic", "optimizer.lr": 1e-3}
        full |= {"memory.blocks_to_swap": 1, "optimizer.ema": 0.9}
        steps = 12
        values = self.values(**{"run.steps": steps, "save.every": 3, "validation.every": 4})
        runs = {"killed": values, "full-killed": {**values, **full}}
        with ThreadPoolExecutor(len(runs)) as pool:
            ends = [pool.submit(self._kill_and_resume, name, one) for name, one in runs.items()]
            wholes = [
                recipe.run(load_config(None, base={**one, "run.name": f"{name}-not"})).folder
                for name, one in runs.items()
            ]
            killed = [end.result() for end in ends]
        left = "+".join(digest(checkpoint(one, steps)) for one in wholes)
        right = "+".join(digest(checkpoint(one, steps)) for one in killed)
        same = all(losses(one) == losses(other) for one, other in zip(wholes, killed))
        return left == right and same, left, right if same else f"{right} LOSSES DIFFER"

    def _kill_and_resume(self, name: str, values: dict[str, Any]) -> Path:
        """The folder of the run that was killed behind its fifth step, and went on."""
        config, folder = self.folder / f"{name}.toml", self.folder / name
        of_run = load_config(None, base={**values, "run.name": name}).config
        config.write_text(dump_config(of_run), encoding="utf-8")
        process = start_training(config)
        while process.poll() is None:
            found, _ = events.read(folder / "events.jsonl")
            if any(event.kind == "step" and event.step >= 5 for event in found):  # type: ignore[attr-defined]
                process.kill()
                break
            time.sleep(0.002)
        process.wait()
        start_training(config, "--resume", "latest").wait()
        return folder


def short(data: bytes) -> str:
    """Twelve hexadecimal digits by which the bits of two runs are compared on one line."""
    return hashlib.blake2b(data, digest_size=6).hexdigest()
