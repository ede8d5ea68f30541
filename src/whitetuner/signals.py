"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from whitetuner.errors import Stopped
from whitetuner.tongue import say

__all__ = ["Signals", "Stopped"]


class Signals:
    """Context that turns SIGINT and SIGTERM into a question, `asked`, that the run answers when it is safe."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def ask(self) -> None:
        """As the first signal does: whoever started this process is gone."""
        self.asked = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("\nstopping: the run saves first; once more leaves at once")
