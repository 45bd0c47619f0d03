"""Progress: a bar on a terminal, plain lines in a log, nothing with `quiet`.

    with Progress("tokenise", total=900, unit="MB", quiet=quiet) as bar:
        bar.advance(3)
        bar.advance(4, loss=2.31, lr=1e-3)

Everything goes to stderr, so that a command's result on stdout can be piped. The rate and the time left come from the
last half minute, so that a slow start does not spoil them.
"""

import sys
import time
from collections import deque
from types import TracebackType
from typing import IO, Any

LOG_EVERY = 10.0  # seconds between two lines of a log
WINDOW = 30.0  # seconds that the rate looks back


class Progress:
    """One task's progress.

    title: what is being done. total: how much there is (None: not known). unit: of what ("tokens", "MB", "steps").
    done: how much was done before (a resumed run); it does not count towards the rate. stream: where to write (stderr).
    """

    def __init__(
        self,
        title: str,
        *,
        total: float | None = None,
        unit: str = "",
        done: float = 0.0,
        quiet: bool = False,
        stream: IO[str] | None = None,
        log_every: float = LOG_EVERY,
    ) -> None:
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.done = done
        self.values: dict[str, Any] = {}
        self._stream = sys.stderr if stream is None else stream
        self._log_every = log_every
        self._bar: Any = None
        self._task: Any = None
        self._started = self._said = time.monotonic()
        self._begun_at = done
        self._past: deque[tuple[float, float]] = deque([(self._started, done)])

    def __enter__(self) -> "Progress":
        if not self.quiet and _is_terminal(self._stream):
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._refresh()
            self._bar.stop()
        elif not self.quiet:
            spent = time.monotonic() - self._started
            ending = f"done in {clock(spent)}" if kind is None else f"stopped after {clock(spent)}"
            self._log(f"{self.text(overall=True)}  {ending}")

    def advance(self, amount: float = 1.0, **values: Any) -> None:
        """Count `amount` more as done, and show `values` (loss=2.31) from now on."""
        self.done += amount
        self.values.update(values)
        now = time.monotonic()
        self._past.append((now, self.done))
        while len(self._past) > 2 and now - self._past[0][0] > WINDOW:
            self._past.popleft()
        if self._bar is not None:
            self._refresh()
        elif not self.quiet and now - self._said >= self._log_every:
            self._said = now
            self._log(self.text())

    @property
    def rate(self) -> float:
        """Units a second over the last half minute; 0 before anything was done."""
        (t0, n0), (t1, n1) = self._past[0], self._past[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None when the total or the rate is unknown."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0.0, self.total - self.done) / self.rate

    def text(self, *, overall: bool = False) -> str:
        """One line: how far, how fast, how long, and the values. overall: the rate since the start instead."""
        spent = time.monotonic() - self._started
        rate = (self.done - self._begun_at) / spent if overall and spent > 0 else self.rate
        parts = [f"{self.title:<12}", amounts(self.done, self.total, self.unit)]
        if rate > 0:
            parts.append(f"{quantity(rate)} {self.unit}/s".replace(" /s", "/s"))
        if not overall and self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        parts.extend(f"{name} {value_text(value)}" for name, value in self.values.items())
        return "  ".join(parts)

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            console=Console(file=self._stream),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(self.title, total=self.total, line="")
        self._bar.update(self._task, completed=self.done)
        self._bar.start()

    def _refresh(self) -> None:
        line = self.text()[len(f"{self.title:<12}") :].strip().replace("[", "\\[")
        self._bar.update(self._task, completed=self.done, line=line)

    def _log(self, line: str) -> None:
        print(line.rstrip(), file=self._stream, flush=True)


def say(text: str, *, quiet: bool = False) -> None:
    """Print one plain line about what happens (stderr; a live bar stays below it). Results go to stdout: `print`."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def amounts(done: float, total: float | None, unit: str) -> str:
    """`512 / 2.05k steps (25 %)`."""
    if total is None:
        return f"{quantity(done)} {unit}".rstrip()
    share = f" ({min(1.0, done / total):.0%})" if total > 0 else ""
    return f"{quantity(done)} / {quantity(total)} {unit}".rstrip() + share


def quantity(number: float) -> str:
    """A number in at most five characters: 7, 0.31, 512, 2.05k, 17.5M, 1.20G."""
    size = abs(number)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.0f}" if size >= 100 or number == int(number) else f"{number:.3g}"


def value_text(value: Any) -> str:
    """A value beside a bar: floats to four digits, everything else as it prints."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """`42 s`, `3:05`, `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _is_terminal(stream: IO[str]) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())
