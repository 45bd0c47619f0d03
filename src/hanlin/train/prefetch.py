"""The work of one optimizer step, made ready in a thread while the step before it is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from hanlin.data.batch import Batch, BatchSource


@dataclass(frozen=True)
class StepWork:
    """This rank's share of optimizer step `step` (0-based): its micro-batches on the host, and what they count."""

    step: int
    parts: list[Batch]
    denominators: dict[str, float]
    tokens: int

    @property
    def length(self) -> int:
        """Tokens a row."""
        return int(self.parts[0].ids.shape[-1])


def prepare_step(
    step: int,
    source: BatchSource,
    count: Callable[[Batch], dict[str, float]],
    share: Callable[[int], tuple[int, int]],
    micro_batch_size: int | None,
) -> StepWork:
    """Ask for this rank's rows of a step (`share` of all), cut them into micro-batches and count denominators."""
    start, stop = share(source.rows_per_step)
    batch = source.batch(step, start, stop)
    size = micro_batch_size or len(batch)
    parts = [batch.rows(i, min(i + size, len(batch))) for i in range(0, len(batch), size)]
    denominators: dict[str, float] = {}
    for part in parts:
        for name, number in count(part).items():
            denominators[name] = denominators.get(name, 0.0) + number
    return StepWork(step, parts, denominators, batch.tokens)


class Prefetch:
    """`take(step)` gives a step's work and begins with the next one's, while below `last`. An error in the thread is
    raised by `take`. ahead False: nothing is made before it is asked for, as a live source wants it."""

    def __init__(self, prepare: Callable[[int], StepWork], last: int, *, ahead: bool = True) -> None:
        self._prepare, self._last = prepare, last if ahead else 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hanlin-prefetch")
        self._next: Future[StepWork] | None = None
        self._next_step = -1

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> StepWork:
        work = self._next.result() if self._next is not None and self._next_step == step else self._prepare(step)
        self._next_step = step + 1
        self._next = self._pool.submit(self._prepare, step + 1) if step + 1 < self._last else None
        return work
