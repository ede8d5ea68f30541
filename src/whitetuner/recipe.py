"""A whole training run, read from top to bottom.

check everything -> scan the pictures -> encode them -> load the denoiser -> attach the adapter -> resume -> learn -> files
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whitetuner.assemble import assemble
from whitetuner.between import previews_of, validation_of
from whitetuner.checkpoint.store import Store
from whitetuner.config.kinds import refuse_quantised_full
from whitetuner.config.landed import refuse_not_landed
from whitetuner.config.load import Loaded, dump_config
from whitetuner.data.loader import Loader
from whitetuner.data.scan import Scan
from whitetuner.diffusion.sigmas import SigmaSettings
from whitetuner.errors import EXIT_FAILED, UserError, out_of_memory
from whitetuner.final_files import write_final
from whitetuner.planning import Shape, cap_memory, correct_plan, way_of
from whitetuner.prepared import data_hash, find_items, phase_build, prepare_data, shift_of
from whitetuner.rehearsal import rehearse
from whitetuner.resolve import Resolved, resolve
from whitetuner.resuming import find_checkpoint, same_data, same_resolved
from whitetuner.runs import events
from whitetuner.runs.board import Board
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.report import write_report
from whitetuner.signals import Signals, Stopped
from whitetuner.train.learner import Learner
from whitetuner.train.loop import Hooks, LoopSettings, train
from whitetuner.train.optim import lr_factor
from whitetuner.train.step import StepSettings

#: Seconds between progress events: ten thousand pictures must not make ten thousand lines.
PROGRESS_EVERY_S = 0.25

#: Steps after which the plan is held against what was seen.
CORRECTED_AFTER = 3

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
    with Session.open(loaded, resume=resume, listeners=listeners) as session:
        return session.run()


class Session:
    """A run that owns its folder: prepared, advanced step by step or to the end, saved, finished."""

    def __init__(
        self,
        loaded: Loaded,
        resolved: Resolved,
        folder: RunFolder,
        signals: Signals,
        listeners: tuple[Listener, ...],
        resume: str | None,
    ) -> None:
        self.loaded, self.config, self.resolved, self.folder = loaded, loaded.config, resolved, folder
        self.family, self.device = resolved.family, resolved.device
        self.signals, self.listeners, self.resume = signals, listeners, resume
        self.build = phase_build(loaded.config, resolved, lambda text: self._message("info", text))
        self.decoder: torch.nn.Module | None = None
        self.board: Board | None = None
        self.step = 0
        self.begun = False
        self._closing = ExitStack()
        self._batches: Loader | None = None
        self._told_progress = 0.0

    @classmethod
    @contextmanager
    def open(
        cls, loaded: Loaded, *, resume: str | None = None, listeners: tuple[Listener, ...] = ()
    ) -> Iterator[Session]:
        """Checks config and model, then takes the run's folder. Raises UserError before anything is written."""
        config = loaded.config
        refuse_quantised_full(config)
        refuse_not_landed(config)
        resolved = resolve(config)
        rehearse(config, resolved.family)
        resume = resume or config.run.resume
        path = Path(config.run.output_dir) / config.run.name
        with (
            RunFolder.open(path, resume=resume is not None, config=loaded.path) as folder,
            Signals() as signals,
        ):
            session = cls(loaded, resolved, folder, signals, listeners, resume)
            with session._closing:
                session._closing.callback(session.build.release)
                yield session

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """All that is left: prepared if it is not yet, to the final files; saved and stopped in between when asked to."""
        path = self.folder.path
        try:
            if not self.begun:
                self.prepare()
            stopped = not self.advance(self.data.steps)
            if stopped:
                self.save()
            files = () if stopped else self.finish()
        except Stopped:
            stopped, files = True, ()
        except UserError as error:
            self._failed(error)
            raise
        except (RuntimeError, MemoryError) as error:
            failure = out_of_memory(error, str(path))
            if failure is None:
                raise
            self._failed(failure)
            raise failure from error
        except OSError as error:  # previews, curves, run.json: whatever of the run's folder cannot be written
            failure = UserError(
                "the run cannot be written ({reason}); what was saved before is intact",
                where=str(error.filename or path),
                mend="make room or mend the folder's rights, then go on with --resume latest",
                code=EXIT_FAILED,
                reason=error.strerror or error,
            )
            self._failed(failure)
            raise failure from error
        status = "stopped" if stopped else "finished"
        self.tell(events.Ended(status=status, step=self.step))
        self._report(status)
        return Result(path, self.step, stopped, files)

    def _failed(self, error: UserError) -> None:
        """Writes down why, unless the run was refused before it began; where even that cannot be written, the screen says it."""
        if self.begun:
            with suppress(UserError):
                self.tell(events.Failed(reason=str(error)))
            self._report("failed")

    def _report(self, status: str) -> None:
        """The report is a view of what is on disk already: that it cannot be written fails no run."""
        try:
            write_report(self.folder.path, status)
        except OSError as error:
            with suppress(UserError):
                self._message("warning", f"report.html cannot be written ({error.strerror or error})")

    def prepare(self) -> None:
        """Scans and encodes the pictures, loads the denoiser, attaches the adapter, goes back to a checkpoint if asked."""
        config, folder = self.config, self.folder
        earlier = folder.document() if folder.is_run() else {}
        before = earlier.get("resolved", {})
        # A refused resume must leave the run as it was: all that can refuse it comes before the first write.
        checkpoint, told = (
            (None, []) if self.resume is None else find_checkpoint(self.resume, folder, earlier, config)
        )
        found = None
        cap_memory(config, self.device)
        if checkpoint is not None:
            found = find_items(config, self.family)
            same_data(before, data_hash(found, config))
            now = {**self.resolved.facts(), "shift": shift_of(config, self.family, found)}
            same_resolved(before, now)
            self._plan(found, before)
        document = folder.begin(
            dump_config(config), self.loaded.document(), origins=dict(self.loaded.origins)
        )
        self.begun = True
        if self.resume is not None:
            folder.cut_events_after(checkpoint.step if checkpoint else 0)
        self.store = Store(folder.checkpoints, document["run_id"], config.save.keep)
        began = checkpoint.step if checkpoint else None
        self.step = began or 0
        self.tell(events.RunStarted(name=config.run.name, resumed_from=began, steps=config.run.steps))
        for event in told:
            self.tell(event)
        for advice in self.family.spec.advice(self.family.options, self.family.paths):
            self._message("warning", str(advice))
        if self.resolved.facts()["random_weights"]:
            self._message("info", "the weights of this model are random: it draws noise")
        if found is None:
            found = find_items(config, self.family, self._progress)
            self._plan(found, {})
        for line in self.way.words():
            self._message("info", line)
        self.data = prepare_data(config, self.resolved, self.build, self._progress, found, self.way.encoding)
        self.build.release()
        folder.update(resolved={**self.resolved.facts(), **self.data.facts(), **self.way.facts()})
        for note in self.data.notes:
            self._message("info", note)
        self.tell(events.Phase(name="load"))
        self.team = assemble(config, self.family, self.resolved, self.way, self._message)
        if checkpoint is not None:
            self.team.load(checkpoint.tensors, checkpoint.documents)
            for path in self.store.set_aside_after(checkpoint.step):
                self._message("info", f"a later checkpoint was set aside: {path.name}")
        self._begin_training()

    def _plan(self, found: Scan, before: Mapping[str, Any]) -> None:
        """How the denoiser fits the device, from the sizes of the pictures; before: what the run began with."""
        batch = self.config.data.batch_size
        shapes = {Shape(item.size, batch, item.condition_sizes) for item in found.items}
        self.way = way_of(
            self.config, self.family, self.device, self.resolved.dtype, sorted(shapes, key=str), before
        )

    def _step_settings(self, learner: Learner) -> StepSettings:
        noise = self.config.noise
        sigmas = SigmaSettings(
            timesteps=noise.timesteps,
            sigmoid_scale=noise.sigmoid_scale,
            sigmoid_bias=noise.sigmoid_bias,
            shift=self.data.shift,
            lognorm_alpha=noise.lognorm_alpha,
            min_timestep=noise.min_timestep,
            max_timestep=noise.max_timestep,
            part_range=learner.part.sigma_range,
        )
        return StepSettings(self.config.run.seed, sigmas, noise.loss_weighting, noise.noise_offset)

    def _begin_training(self) -> None:
        config, accumulate = self.config, self.config.optimizer.gradient_accumulation
        self._batches = self._closing.enter_context(self.data.loader(self.step * accumulate))
        if config.log.tensorboard:
            self.board = Board(self.folder.tensorboard, self.data.steps)
            self._closing.callback(self.board.close)
        self.tell(events.Phase(name="train", total=self.data.steps))
        self._began_at = self.step
        if self.step == 0:
            if config.validation.every:
                self._validate(0)
            if config.preview.every and config.preview.at_start:
                self._preview(0)

    def advance(self, until: int) -> bool:
        """Learns until this step; False when it was stopped before. Saves, previews and validates in between as due."""
        o, start = self.config.optimizer, self.step
        if self.device.type == "cuda" and start == self._began_at:
            torch.cuda.reset_peak_memory_stats(self.device)  # of the steps, not of encoding and loading
        hooks = Hooks(
            on_step=self.tell,
            after_step=self._between,
            stop_asked=lambda: self.signals.asked or self.folder.asked("stop"),
            on_bad=lambda step: self._save_last_good(step > start),
        )
        assert self._batches is not None, "advance before prepare"
        while self.step < until:
            learner = self.team.at(self.step)
            self.team.make_way_for(learner)
            settings = LoopSettings(
                steps=until if len(self.team.learners) == 1 else min(until, self.team.turn_ends(self.step)),
                lr=o.lr,
                lr_at=lambda step: lr_factor(
                    step, self.data.steps, o.schedule, o.warmup_steps, o.min_lr_ratio
                ),
                accumulate=o.gradient_accumulation,
                max_grad_norm=o.max_grad_norm,
            )
            outcome = train(
                self.family,
                learner,
                self._batches,
                self._step_settings(learner),
                settings,
                hooks,
                start=self.step,
                device=self.device,
            )
            if outcome.stopped:
                return False
        return True

    # -- between steps ---------------------------------------------------------------------------------------------

    def _between(self, step: int) -> None:
        self.step = step
        if step == self._began_at + CORRECTED_AFTER:
            seen = correct_plan(self.way, self.team.at(step - 1).fitted, self.device)
            if seen:
                self.folder.update(measured=seen)
        config, last = self.config, step == self.data.steps
        due = lambda every: bool(every) and (step % every == 0 or last)  # noqa: E731 - a word of this paragraph only
        if due(config.validation.every):
            self._validate(step)
        if self.folder.take("preview") or due(config.preview.every):
            self._preview(step)
        if self.folder.take("save") or due(config.save.every) or last:
            self.save()

    def save(self) -> Path:
        """A checkpoint of now. Raises UserError when it cannot be written; earlier ones stay."""
        began = time.perf_counter()
        tensors, documents = self.team.save()
        path = self.store.save(
            self.step, tensors, documents, {"config": self.loaded.document()}, self.loaded.metadata()
        )
        where = path.relative_to(self.folder.path).as_posix()
        self.tell(events.Saved(step=self.step, path=where, seconds=time.perf_counter() - began))
        return path

    def _save_last_good(self, learned: bool) -> None:
        if learned:
            self.save()

    def _validate(self, step: int) -> None:
        count = self.config.validation.sigmas
        event = validation_of(
            step, self.family, self.team, self.data, self._step_settings, count, self.device
        )
        if event is not None:
            self.tell(event)

    def _preview(self, step: int) -> None:
        if not self.data.scenes or (self.family.spec.unlearned(self.family.options) and not self.team.beside):
            return
        if self.decoder is None:
            self.decoder = self.family.load_decoder(self.build)
        limit = self.config.preview.max_seconds
        for event in previews_of(
            step, self.family, self.team, self.decoder, self.data, self.folder, limit, self.device
        ):
            self.tell(event)

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> tuple[Path, ...]:
        """Writes the final files: the averaged adapter for ComfyUI (under the run's name too) and for diffusers."""
        self.tell(events.Phase(name="export"))
        return write_final(self.config, self.team, self.family.keys, self.folder, self.loaded.metadata())

    def _progress(self, phase: str, done: int, total: int) -> None:
        if self.signals.asked or self.folder.asked("stop"):
            raise Stopped
        if done == 0:
            self.tell(events.Phase(name=phase, total=total))
        now = time.monotonic()
        if done == total or now - self._told_progress >= PROGRESS_EVERY_S:
            self._told_progress = now
            self.tell(events.Progress(phase=phase, done=done, total=total))

    def _message(self, level: str, text: str) -> None:
        self.tell(events.Message(level=level, text=text))

    def tell(self, event: events.Event) -> None:
        self.folder.append(event)
        for listener in self.listeners:
            listener(event)
        if self.board is not None:
            self.board(event)
