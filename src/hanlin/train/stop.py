"""SIGTERM and Ctrl-C ask the loop to stop at the end of its step; a second Ctrl-C leaves at once."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 1.0  # seconds in which a second Ctrl-C is the same one: a launcher passes the terminal's on to its children


class StopRequest:
    """As a context manager it takes the two signals; `received` is the first one that came, or None.

    Outside the main thread Python hands out no signals: there it never becomes true, and the caller's handlers stay.
    notice: said on stderr when the first signal comes ("" for nothing).
    """

    def __init__(self, notice: str = "") -> None:
        self.received: signal.Signals | None = None
        self._notice = notice
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = signal.Signals(number), time.monotonic()
            if self._notice:  # not print: its buffer may be in use where the signal struck
                os.write(2, f"\n{self._notice}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._when > PATIENCE:
            raise KeyboardInterrupt
