"""A whole training run, read from top to bottom.

check everything -> scan the pictures -> encode them -> load the denoiser -> attach the adapter -> resume -> learn -> files
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whitetuner.adapters.attach import attach, layer_sizes
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings, reading_limits
from whitetuner.checkpoint.export import check_names, export_adapter
from whitetuner.checkpoint.store import Checkpoint, Store, read
from whitetuner.config.landed import refuse_not_landed
from whitetuner.config.load import Loaded, dump_config
from whitetuner.config.resume import check_resume
from whitetuner.config.schema import Config
from whitetuner.diffusion.sigmas import SigmaSettings
from whitetuner.errors import UserError
from whitetuner.family import BuildFn
from whitetuner.memory.build import build_module
from whitetuner.prepared import Prepared, prepare_data
from whitetuner.resolve import Resolved, resolve
from whitetuner.runs import events
from whitetuner.runs.board import Board
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.report import write_report
from whitetuner.signals import Signals, Stopped
from whitetuner.train.ema import Ema
from whitetuner.train.learner import Learner
from whitetuner.train.loop import Hooks, LoopSettings, Outcome, train
from whitetuner.train.optim import lr_factor, make_optimizer
from whitetuner.train.preview import draw_previews
from whitetuner.train.step import StepSettings
from whitetuner.train.validate import sigma_grid, validate

Listener = Callable[[events.Event], None]


@dataclass(frozen=True)
class Result:
    """folder: of the run; stopped: saved before its last step; final: the files to take (empty when stopped)."""

    folder: Path
    step: int
    stopped: bool
    final: tuple[Path, ...]


def run(loaded: Loaded, *, resume: str | None = None, listeners: tuple[Listener, ...] = ()) -> Result:
    """Trains as the config says. Raises UserError for what the user can mend; everything saved before stays.

    resume: None, "latest" or a checkpoint folder; listeners hear every event after it is on disk
    """
    config = loaded.config
    refuse_not_landed(config)
    resolved = resolve(config)
    resume = resume or config.run.resume
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder.open(Path(config.run.output_dir) / config.run.name, resume=resume is not None))
        signals = stack.enter_context(Signals())
        return _Run(loaded, resolved, folder, signals, listeners).go(resume)


class _Run:
    """What the paragraphs of one run share."""

    def __init__(
        self, loaded: Loaded, resolved: Resolved, folder: RunFolder, signals: Signals, listeners: tuple[Listener, ...]
    ) -> None:
        self.loaded, self.config, self.resolved, self.folder = loaded, loaded.config, resolved, folder
        self.family, self.device = resolved.family, resolved.device
        self.signals, self.listeners = signals, listeners
        self.build: BuildFn = partial(build_module, dtype=resolved.dtype, device=resolved.device)
        self.decoder: torch.nn.Module | None = None
        self.board: Board | None = None

    # -- the run ---------------------------------------------------------------------------------------------------

    def go(self, resume: str | None) -> Result:
        config, folder = self.config, self.folder
        before = folder.document().get("resolved", {}) if folder.is_run() else {}
        document = folder.begin(dump_config(config), self.loaded.document(), origins=dict(self.loaded.origins))
        self.store = Store(folder.checkpoints, document["run_id"], config.save.keep)
        checkpoint, told = self._checkpoint(resume, document)
        began = checkpoint.step if checkpoint else None
        self.tell(events.RunStarted(name=config.run.name, resumed_from=began, steps=config.run.steps))
        for event in told:
            self.tell(event)
        for advice in self.family.spec.advice(self.family.options, self.family.paths):
            self.tell(events.Message(level="warning", text=str(advice)))
        if self.resolved.facts()["random_weights"]:
            self.tell(events.Message(level="info", text="the weights of this model are random: it draws noise"))
        try:
            data = prepare_data(config, self.resolved, self.build, self._progress)
            facts = {**self.resolved.facts(), **data.facts()}
            if checkpoint is not None:
                self._same(before, facts)
            folder.update(resolved=facts)
            for note in data.notes:
                self.tell(events.Message(level="info", text=note))
            self.tell(events.Phase(name="load"))
            learner = self._learner()
            step = 0
            if checkpoint is not None:
                learner.load(checkpoint.tensors, checkpoint.documents)
                step = checkpoint.step
            outcome = self._learn(learner, data, step, data.steps)
        except Stopped:
            self.tell(events.Ended(status="stopped", step=checkpoint.step if checkpoint else 0))
            return Result(folder.path, checkpoint.step if checkpoint else 0, True, ())
        except UserError as error:
            self.tell(events.Failed(reason=str(error)))
            write_report(folder.path, "failed")
            raise
        if outcome.stopped:
            self._save(learner, outcome.step)
            self.tell(events.Ended(status="stopped", step=outcome.step))
            write_report(folder.path, "stopped")
            return Result(folder.path, outcome.step, True, ())
        self.tell(events.Phase(name="export"))
        files = self._final(learner, data)
        self.tell(events.Ended(status="finished", step=outcome.step))
        write_report(folder.path, "finished")
        return Result(folder.path, outcome.step, False, files)

    def _checkpoint(self, resume: str | None, document: dict[str, Any]) -> tuple[Checkpoint | None, list[events.Event]]:
        """What the run goes on from, and what is to be said of it (after the events that will happen again are cut)."""
        told: list[events.Event] = []
        if resume is None:
            return None, told
        if resume == "latest":
            found = self.store.latest(lambda error: told.append(events.Message(level="warning", text=str(error))))
            if found is None:
                told.append(events.Message(level="info", text="nothing is saved in this folder yet: the run starts anew"))
        else:
            found = read(Path(resume))
            if found.state.get("run_id") != document["run_id"]:
                raise UserError(
                    "this checkpoint belongs to another run",
                    where=resume,
                    mend="resume it inside its own run folder, or set method.init_from to begin a new run from its adapter",
                )
        if found is not None:
            told += [events.Message(level="info", text=text) for text in check_resume(found.state["config"], self.config)]
        self.folder.cut_events_after(found.step if found else 0)
        return found, told

    def _same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """What `auto` came to, and the data, must be what the run began with: otherwise other numbers would come out."""
        if before.get("data_hash") != now["data_hash"]:
            raise UserError(
                "the pictures or captions are not those this run began with",
                where="[data]",
                mend="put them back, or start a new run (another run.name; method.init_from takes the adapter along)",
            )
        for key in ("dtype", "shift", "device_type"):
            if before.get(key) != now[key]:
                raise UserError(
                    "{key} was {old} when the run began and comes to {new} here",
                    where="--resume",
                    mend="set it in the config as it was, or start a new run from the adapter (method.init_from)",
                    key=key,
                    old=before.get(key),
                    new=now[key],
                )

    def _learner(self) -> Learner:
        config, family = self.config, self.family
        part = family.spec.parts(family.options)[0]
        module = family.load(self.build)[part.name]
        patterns = config.method.targets or list(family.spec.adapter_targets)
        settings = AdapterSettings(
            kind=config.method.kind,
            rank=config.method.rank,
            alpha=config.method.alpha,
            factor=config.method.factor,
            full_matrix=config.method.full_matrix,
        )
        paths = choose(module, patterns)
        for naming in ("comfyui", "diffusers"):  # the two that _final writes
            check_names(paths, family.keys, naming)
        for limit in reading_limits(layer_sizes(module, paths), settings):
            self.tell(events.Message(level="warning", text=str(limit)))
        adapter = attach(module, paths, settings, seed=config.run.seed, device=self.device)
        if config.method.init_from:
            adapter.load_file(Path(config.method.init_from), family.keys)
        if config.memory.gradient_checkpointing is True or (
            config.memory.gradient_checkpointing == "auto" and self.device.type == "cuda"
        ):
            module.enable_gradient_checkpointing()
        parameters = list(adapter.parameters())
        o = config.optimizer
        optimizer = make_optimizer(
            o.name, parameters, lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps, args=o.args
        )
        ema = Ema(parameters, o.ema) if o.ema else None
        return Learner(part, module, adapter, config.method.kind, optimizer, ema)

    def _learn(self, learner: Learner, data: Prepared, start: int, steps: int) -> Outcome:
        config = self.config
        o, n = config.optimizer, config.noise
        sigmas = SigmaSettings(
            timesteps=n.timesteps,
            sigmoid_scale=n.sigmoid_scale,
            sigmoid_bias=n.sigmoid_bias,
            shift=data.shift,
            lognorm_alpha=n.lognorm_alpha,
            min_timestep=n.min_timestep,
            max_timestep=n.max_timestep,
            part_range=learner.part.sigma_range,
        )
        self.step_settings = StepSettings(config.run.seed, sigmas, n.loss_weighting, n.noise_offset)
        settings = LoopSettings(
            steps=steps,
            lr=o.lr,
            lr_at=lambda step: lr_factor(step, steps, o.schedule, o.warmup_steps, o.min_lr_ratio),
            accumulate=o.gradient_accumulation,
            max_grad_norm=o.max_grad_norm,
        )
        hooks = Hooks(
            on_step=self.tell,
            after_step=lambda step, change: self._between(learner, data, step, steps),
            stop_asked=lambda: self.signals.asked or self.folder.asked("stop"),
            on_bad=lambda step: self._save(learner, step) if step > start else None,
        )
        if config.log.tensorboard:
            self.board = Board(self.folder.tensorboard, steps)
        self.tell(events.Phase(name="train", total=steps))
        if start == 0:
            if config.validation.every:
                self._validate(learner, data, 0)
            if config.preview.every and config.preview.at_start:
                self._preview(learner, data, 0)
        with data.loader(start * o.gradient_accumulation) as batches:
            return train(
                self.family, learner, batches, self.step_settings, settings, hooks, start=start, device=self.device
            )

    # -- between steps ---------------------------------------------------------------------------------------------

    def _between(self, learner: Learner, data: Prepared, step: int, steps: int) -> None:
        config, last = self.config, step == steps
        due = lambda every: bool(every) and (step % every == 0 or last)  # noqa: E731 - a word of this paragraph only
        if due(config.validation.every):
            self._validate(learner, data, step)
        if due(config.preview.every) or self.folder.take("preview"):
            self._preview(learner, data, step)
        if due(config.save.every) or self.folder.take("save") or last:
            self._save(learner, step)

    def _save(self, learner: Learner, step: int) -> None:
        began = time.perf_counter()
        tensors, documents = learner.save()
        path = self.store.save(step, tensors, documents, {"config": self.loaded.document()}, self._metadata())
        self.tell(events.Saved(step=step, path=str(path.relative_to(self.folder.path)), seconds=time.perf_counter() - began))

    def _validate(self, learner: Learner, data: Prepared, step: int) -> None:
        if not data.validation:
            return
        grid = sigma_grid(self.config.validation.sigmas, *learner.part.sigma_range)
        began = time.perf_counter()
        with learner.averaged():
            modules = {learner.part.name: learner.module}
            found = validate(
                self.family, modules, learner.part.name, data.validation, grid, self.step_settings, self.device
            )
        self.tell(
            events.Validation(
                step=step,
                loss=found.loss,
                by_sigma={str(k): v for k, v in found.by_sigma.items()},
                seconds=time.perf_counter() - began,
                held_out=data.held_out,
            )
        )

    def _preview(self, learner: Learner, data: Prepared, step: int) -> None:
        if not data.scenes:
            return
        if self.decoder is None:
            self.decoder = self.family.load_decoder(self.build)
        with learner.averaged():
            drawn = draw_previews(
                self.family,
                {learner.part.name: learner.module},
                self.decoder.to(self.device),
                data.scenes,
                self.folder.samples,
                step,
                self.config.preview.max_seconds,
            )
        if self.device.type != "cpu":
            self.decoder.to("cpu")
        if drawn.skipped:
            text = f"{drawn.skipped} previews of step {step} left out: preview.max_seconds was reached"
            self.tell(events.Message(level="info", text=text))
        files = [path.relative_to(self.folder.path).as_posix() for path in drawn.files]
        self.tell(
            events.Preview(step=step, files=files, prompts=[s.text for s in data.scenes[: len(files)]], seconds=drawn.seconds)
        )

    # -- the end ---------------------------------------------------------------------------------------------------

    def _final(self, learner: Learner, data: Prepared) -> tuple[Path, ...]:
        config, final = self.config, self.folder.final
        kind = config.method.kind
        with learner.averaged():
            tensors = learner.adapter_tensors()
            write = partial(
                export_adapter,
                tensors,
                learner.adapter.settings,
                self.family.keys,
                metadata=self._metadata(),
                dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config.save.dtype],
            )
            named = final / f"{config.run.name}.safetensors"
            plain, diffusers = final / kind / f"{kind}.safetensors", final / kind / f"{kind}_diffusers.safetensors"
            write(path=plain, naming="comfyui")
            write(path=diffusers, naming="diffusers")
        _same_file(plain, named)
        return named, plain, diffusers

    def _metadata(self) -> dict[str, str]:
        return self.loaded.metadata()

    def _progress(self, phase: str, done: int, total: int) -> None:
        if self.signals.asked or self.folder.asked("stop"):
            raise Stopped
        if done == 0:
            self.tell(events.Phase(name=phase, total=total))
        self.tell(events.Progress(phase=phase, done=done, total=total))

    def tell(self, event: events.Event) -> None:
        self.folder.append(event)
        for listener in (*self.listeners, *([self.board] if self.board else [])):
            listener(event)


def _same_file(source: Path, target: Path) -> None:
    """target becomes a hard link to source, or a copy where links are not to be had."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # FAT, some network drives
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
