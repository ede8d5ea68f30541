"""A whole training run, read from top to bottom.

check everything -> scan the pictures -> encode them -> load the denoiser -> attach the adapter -> resume -> learn -> files
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from whitetuner import sharing
from whitetuner.assemble import assemble, step_settings
from whitetuner.between import is_due, previews_of, shared_previews
from whitetuner.checkpoint.store import Store
from whitetuner.config.load import Loaded, dump_config
from whitetuner.data.loader import Loader
from whitetuner.errors import UserError, cannot_write, out_of_memory
from whitetuner.final_files import write_final
from whitetuner.final_notes import beside_final
from whitetuner.planning import cap_memory, correct_plan
from whitetuner.prepared import cache_folder, phase_build, prepare_data, shift_of
from whitetuner.rehearsal import rehearse
from whitetuner.resolve import Resolved, resolve
from whitetuner.resuming import same_data, same_resolved
from whitetuner.runs import events
from whitetuner.runs.board import Board
from whitetuner.runs.folder import Guest, RunFolder
from whitetuner.runs.follow import Follower, followers
from whitetuner.runs.report import write_report
from whitetuner.signals import Signals, Stopped
from whitetuner.train.distributed import Ranks
from whitetuner.train.loop import ALONE, Hooks, LoopSettings, train
from whitetuner.train.optim import lr_factor
from whitetuner.validating import Validating

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


def run(
    loaded: Loaded, *, resume: str | None = None, listeners: tuple[Listener, ...] = (), ranks: Ranks = ALONE
) -> Result:
    """Trains as the config says. Raises UserError for what the user can mend; everything saved before stays.

    resume: None, "latest" or a checkpoint folder; listeners hear every event after it is on disk
    ranks:  that train together; the first one writes the run's folder and draws the previews, the others only learn
    """
    with Session.open(loaded, resume=resume, listeners=listeners, ranks=ranks) as session:
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
        ranks: Ranks,
    ) -> None:
        self.loaded, self.config, self.resolved, self.folder = loaded, loaded.config, resolved, folder
        self.family, self.device = resolved.family, resolved.device
        self.signals, self.resume, self.ranks = signals, resume, ranks
        # Of a sharded model each rank has a share: all take part. Else the first one validates, draws and saves for all.
        self.company = ranks if loaded.config.memory.shard else ALONE
        self.takes_part = ranks.first or self.company is ranks
        self.listeners = listeners if ranks.first else ()
        self.build = phase_build(loaded.config, resolved, lambda text: self._message("info", text))
        self.decoder: torch.nn.Module | None = None
        self.boards: list[Board | Follower] = []
        self.validating: Validating | None = None
        self.step = 0
        self.begun = False
        self._closing = ExitStack()
        self._batches: Loader | None = None
        self._told_progress = 0.0

    @classmethod
    @contextmanager
    def open(
        cls,
        loaded: Loaded,
        *,
        resume: str | None = None,
        listeners: tuple[Listener, ...] = (),
        ranks: Ranks = ALONE,
    ) -> Iterator[Session]:
        """Checks config and model, then takes the run's folder. Raises UserError before anything is written."""
        config = loaded.config
        with ExitStack() as stack:
            with ranks.phase():
                sharing.refuse_wrong(ranks, config)
                resolved = resolve(config, ranks.local)
                rehearse(config, resolved.family)
                resume = resume or config.run.resume
                path = Path(config.run.output_dir) / config.run.name
                taken = RunFolder.open if ranks.first else Guest.open
                folder = stack.enter_context(taken(path, resume=resume is not None, config=loaded.path))
            signals = stack.enter_context(Signals())
            session = cls(loaded, resolved, folder, signals, listeners, resume, ranks)
            ranks.on_loss(session._note, signals.ask)
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
            with self.ranks.phase():  # the others stay until the first one has written everything
                files = self._write_end(stopped) if self.takes_part else ()
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
            failure = cannot_write(error, str(path))
            self._failed(failure)
            raise failure from error
        if self.ranks.first:
            status: events.Ending = "stopped" if stopped else "finished"
            self.tell(events.Ended(status=status, step=self.step))
            self._report(status)
        return Result(path, self.step, stopped, files)

    def _write_end(self, stopped: bool) -> tuple[Path, ...]:
        if not stopped:
            return self.finish()
        self.save()
        return ()

    def _failed(self, error: UserError) -> None:
        self._note(error)
        with suppress(UserError, Stopped):  # the other ranks end with this word
            self.ranks.meet(error)

    def _note(self, error: UserError) -> None:
        """Writes down why, unless the run was refused before it began; where even that cannot be written, the screen says it."""
        if self.begun and self.ranks.first:
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
        with self.ranks.phase():
            self._prepare()
        self._begin_training()

    def _prepare(self) -> None:
        config, folder, ranks = self.config, self.folder, self.ranks
        earlier = ranks.from_first(lambda: folder.document() if folder.is_run() else {})
        before = earlier.get("resolved", {})
        # A refused resume must leave the run as it was: all that can refuse it comes before the first write.
        checkpoint, told = sharing.checkpoint_of(ranks, self.resume, folder, earlier, config)
        found = None
        cap_memory(config, self.device)
        if checkpoint is not None:
            found, digest = sharing.items_of(ranks, config, self.family)
            same_data(before, digest)
            now = {**self.resolved.facts(), "shift": shift_of(config, self.family, found)}
            same_resolved(before, now)
            self.way = sharing.way_together(ranks, config, self.resolved, found, before)
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
            found, _ = sharing.items_of(ranks, config, self.family, self._progress)
            self.way = sharing.way_together(ranks, config, self.resolved, found, {})
        shares = sharing.shares_of(ranks, config, before if checkpoint is not None else {})
        for line in [*self.way.words(), *sharing.words_of(shares, config)]:
            self._message("info", line)
        self.data = prepare_data(
            config,
            self.resolved,
            self.build,
            self._progress,
            found,
            self.way.encoding,
            shares=shares,
            cache_share=sharing.cache_share(ranks, cache_folder(config)),
            wait=ranks.meet,
        )
        self.build.release()
        folder.update(resolved={**self.resolved.facts(), **self.data.facts(), **self.way.facts()})
        for note in self.data.notes:
            self._message("info", note)
        self.tell(events.Phase(name="load"))
        arenas = sharing.arenas_of(ranks, config, self.resolved, self.way, self._message)
        self.team = assemble(config, self.family, self.resolved, self.way, self._message, arenas, ranks)
        if checkpoint is not None:
            self.team.load(checkpoint.tensors, checkpoint.documents)
            for path in self.store.set_aside_after(checkpoint.step) if ranks.first else ():
                self._message("info", f"a later checkpoint was set aside: {path.name}")
        for learner in self.team.learners:
            if not learner.in_passes:  # a whole model is of the same files everywhere
                ranks.broadcast(learner.parameters)
        folder.update(ranks=sharing.residency(ranks, self.team, self.device, self._message))

    def _begin_training(self) -> None:
        config = self.config
        self._batches = self._closing.enter_context(self.data.loader(self.step))
        warn, path = partial(self._message, "warning"), self.folder.path
        if self.ranks.first:
            self.boards += followers(config.log.elsewhere, config.log.project, path, warn)
            if config.log.tensorboard:
                self.boards.append(Board(self.folder.tensorboard, self.data.steps, self.ranks.world, warn))
        for board in self.boards:
            self._closing.callback(board.close)
        self.tell(events.Phase(name="train", total=self.data.steps))
        self._began_at = self.step
        if self.takes_part:
            where = (self.data, self.folder, self.device, self.company, self.tell)
            self.validating = Validating(config, self.family, lambda: self.team, *where)
            self.validating.begin(self.step)
        if self.step == 0 and config.preview.every and config.preview.at_start:
            self._preview(0, of_all=True)

    def advance(self, until: int) -> bool:
        """Learns until this step; False when it was stopped before. Saves, previews and validates in between as due."""
        o, start = self.config.optimizer, self.step
        if self.device.type == "cuda" and start == self._began_at:
            torch.cuda.reset_peak_memory_stats(self.device)  # of the steps, not of encoding and loading
        hooks = Hooks(
            on_step=self.tell,
            after_step=self._between,
            stop_asked=lambda: self.signals.asked or self.folder.asked("stop"),
            on_bad=lambda step: self.save() if step > start and self.takes_part else None,
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
                max_grad_norm=o.max_grad_norm,
            )
            outcome = train(
                self.family,
                learner,
                self._batches,
                step_settings(self.config, self.data.shift, learner.part),
                settings,
                hooks,
                start=self.step,
                device=self.device,
                ranks=self.ranks,
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
        due = partial(is_due, step=step, steps=self.data.steps)
        if self.takes_part:
            with self.company.phase():
                self._due(step, due)
        elif due(self.config.preview.every):
            self._preview(step, of_all=True)

    def _due(self, step: int, due: Callable[[int], bool]) -> None:
        config, asked = self.config, lambda word: self.company.from_first(partial(self.folder.take, word))
        if self.validating is not None and self.validating.due(step):
            self.validating.now(step)
        if asked("preview") or due(config.preview.every):
            self._preview(step, of_all=due(config.preview.every))
        if asked("save") or due(config.save.every) or step == self.data.steps:
            self.save()

    def save(self) -> Path:
        """A checkpoint of now. Raises UserError when it cannot be written; earlier ones stay."""
        began = time.perf_counter()
        tensors, documents = self.team.save()
        if not self.ranks.first:
            return self.folder.path
        self.folder.sync_events()
        measured = {} if self.validating is None else self.validating.held_out_loss(self.step)
        state = {**self.loaded.state(), **measured}
        path = self.store.save(self.step, tensors, documents, state, self.loaded.metadata())
        where = path.relative_to(self.folder.path).as_posix()
        self.tell(events.Saved(step=self.step, path=where, seconds=time.perf_counter() - began))
        return path

    def _preview(self, step: int, of_all: bool) -> None:
        """of_all: all ranks know of it, and replicas draw a share each."""
        lacks = self.family.spec.unlearned(self.family.options) and not self.team.beside
        able = bool(self.data.scenes) and not lacks

        def draw(share: tuple[int, int]) -> list[events.Event]:
            self.decoder = self.decoder or self.family.load_decoder(self.build)
            where = (self.data, self.folder, self.config.preview.max_seconds, self.device, self.company)
            return previews_of(step, self.family, self.team, self.decoder, *where, share)

        among = self.ranks if of_all and self.company is not self.ranks else ALONE
        for event in shared_previews(among, step, able, draw):
            self.tell(event)

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> tuple[Path, ...]:
        """Writes the final files: the averaged adapter for ComfyUI (under the run's name too) and for diffusers."""
        self.tell(events.Phase(name="export"))
        keys, writes = self.family.keys, self.ranks.first
        files = write_final(self.config, self.team, keys, self.folder, self.loaded.metadata(), writes)
        if not writes:
            return ()
        size = self.data.items[0].size
        for path in beside_final(self.config, self.family, self.folder, size, files):
            self._message("info", f"a ComfyUI workflow that draws with it: final/{path.name}")
        return files

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
        self.tell(events.Message(level="warning" if level == "warning" else "info", text=text))

    def tell(self, event: events.Event) -> None:
        self.folder.append(event)
        for listener in (*self.listeners, *self.boards):
            listener(event)
        if self.validating is not None:
            self.validating.hear(event)
