"""Is every rank of the run still there? A thread looks, so that one that is lost ends the run within a minute, by name.

A rank on this machine is looked for as a process, one on another machine by a beat that it leaves in the run's store
(a sign of life every few seconds). A rank that leaves in good order says so first. A collective that waits for a lost rank
may wait for ever (NCCL does): then this thread ends the process, and what is on the disk stays as it is.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.tongue import say

LOOK_EVERY_S = 1.0
#: Between beats, and the silence after which a rank of another machine counts as lost.
BEAT_S, SILENT_S = 4.0, 40.0
#: For the main thread to come out of a collective by itself before the process is ended.
GRACE_S = 8.0


class Store(Protocol):
    """What of torch's TCPStore is used; another connection than the main thread's, whose waiting would keep this one out."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Presence:
    """Where a rank is. host: name of its machine, for people; machine: tells it from all others; born: when its process was,
    which tells it from a later one of its number."""

    rank: int
    host: str
    machine: str
    pid: int
    born: float
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device}, process {self.pid} on {self.host})"

    @property
    def alive(self) -> bool:
        """Of a process on this machine."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.born) < 2 and process.status() not in (
                psutil.STATUS_ZOMBIE,
                psutil.STATUS_DEAD,
            )
        except psutil.Error:
            return False


class Watch:
    """me, others: of the run; launcher: pid of the process that started this rank, 0: none to look for.

    last_words: called with the reason before the process is ended, so that it can be written down; orphaned: called once
    when the launcher is gone.
    """

    def __init__(
        self, store: Store, me: Presence, others: list[Presence], launcher: int, gone_store: Presence | None
    ) -> None:
        self._store, self._me, self._others = store, me, others
        self._launcher, self._gone_store = launcher, gone_store
        self.last_words: Callable[[UserError], None] = lambda _: None
        self.orphaned: Callable[[], None] = lambda: None
        self.lost: UserError | None = None
        self.over = threading.Event()
        self._known = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._beaten = 0.0
        self._remote = [one for one in others if one.machine != me.machine]
        self._found: UserError | None = None
        self._answered = time.monotonic()
        for work in (self._ask, self._run):
            threading.Thread(target=work, name="ranks-watch", daemon=True).start()

    def verdict(self, wait_s: float = SILENT_S + 10) -> UserError | None:
        """Who is lost, as soon as it is known; None when nobody is."""
        self._known.wait(wait_s)
        return self.lost

    def stop(self) -> None:
        self.over.set()

    def _ask(self) -> None:
        """Speaks with the store, which does not answer at all while the way to its machine is cut."""
        while not self.over.wait(LOOK_EVERY_S):
            self._found = self._look()
            self._answered = time.monotonic()
            if self._found is not None:
                return

    def _run(self) -> None:
        while not self.over.wait(LOOK_EVERY_S):
            if self._launcher and not psutil.pid_exists(self._launcher):
                self._launcher = 0
                self.orphaned()
            reason = self._found
            if reason is None and self._gone_store is not None:
                silent = time.monotonic() - self._answered > SILENT_S
                reason = lost_error(self._gone_store) if silent else None
            if reason is None:
                continue
            self.lost = reason
            self._known.set()
            if not self.over.wait(GRACE_S):
                self.last_words(reason)
                say(f"error: {reason}", wrong=True)
                os._exit(EXIT_FAILED)
            return

    def _look(self) -> UserError | None:
        try:
            for one in self._others:
                if (
                    one.machine == self._me.machine
                    and not one.alive
                    and not self._store.check([f"bye/{one.rank}"])
                ):
                    return self._why(one)
            if self._remote:
                return self._look_far()
        except RuntimeError:  # the store is gone, and so is who kept it
            return None if self._gone_store is None else lost_error(self._gone_store)
        return None

    def _why(self, one: Presence) -> UserError:
        return told_error(one, self._store) or lost_error(one)

    def _look_far(self) -> UserError | None:
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            self._store.set(f"beat/{self._me.rank}", str(time.time()))
        for one in self._remote:
            key = f"beat/{one.rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            before, since = self._beats.get(one.rank, (None, now))
            if beat != before:
                self._beats[one.rank] = beat, now
            elif now - since > SILENT_S and not self._store.check([f"bye/{one.rank}"]):
                return self._why(one)
        return None


def lost_error(one: Presence) -> UserError:
    """What is told of a rank that does not answer any more."""
    return UserError(
        "{rank} is gone: it was killed, crashed, or its machine cannot be reached; what was saved before is intact",
        where="the run's ranks",
        mend="look into logs/ of the run's folder for its last words, then go on with --resume latest",
        code=EXIT_FAILED,
        rank=one,
    )


def told_error(one: Presence, store: Store) -> UserError | None:
    """Why a rank ended, in its own words; None when it left none."""
    key = f"failed/{one.rank}"
    return from_words(store.get(key).decode(), one) if store.check([key]) else None


def words(error: UserError) -> str:
    """An error as text that another rank can raise again."""
    values: dict[str, Any] = {key: str(value) for key, value in error.values.items()}
    told = {
        "what": error.what_template,
        "mend": error.mend_template,
        "where": error.where,
        "code": error.code,
        "values": values,
    }
    return json.dumps(told)


class Elsewhere(UserError):
    """Another rank's error, raised here too; the message says whose it is."""


def from_words(text: str, one: Presence) -> UserError:
    """The error that another rank has left as JSON, told here with that rank's number."""
    told = json.loads(text)
    where = f"rank {one.rank}: {told['where']}" if told["where"] else f"rank {one.rank}"
    return Elsewhere(told["what"], where=where, mend=told["mend"], code=told["code"], **told["values"])
