"""What one optimizer step really takes: its peak of bytes and its seconds, measured on this machine.

On a CPU torch has no counter of its allocator's peak, but the profiler notes every allocation and every release
(`[memory]` events). Their running sum from before the model is made is what the allocator holds; its maximum over the
steps is the peak. On a GPU it is `torch.cuda.max_memory_allocated`.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hanlin.models.config import ModelConfig
from hanlin.plan.work import Bench, Work, open_bench

STEP = "hanlin: optimizer step"


@dataclass(frozen=True)
class Measured:
    """peak: bytes at the fullest moment of the steps; resting: bytes before the first of them."""

    peak: int
    resting: int


def measured_peak(config: ModelConfig, work: Work, *, device: str = "cpu", steps: int = 2) -> Measured:
    """Run `steps` real optimizer steps and find the most bytes that the allocator held at once."""
    if device != "cpu":
        return _cuda_peak(config, work, torch.device(device), steps)
    gc.collect()  # what an earlier run left in circles would be given back now, and counted
    with _memory_events() as recorded:
        bench = open_bench(config, work, torch.device(device))
        for _ in range(steps):
            with record_function(STEP):
                bench.step()
    changes = memory_changes(recorded)
    begin = min(event.start_ns() for event in _events(recorded) if event.name() == STEP)
    held = peak = resting = 0
    for moment, change in changes:
        held += change
        if moment < begin:
            resting = held
        else:
            peak = max(peak, held)
    return Measured(peak, resting)


def memory_changes(recorded: profile) -> list[tuple[int, int]]:
    """(nanosecond, bytes taken or given back) of every event of the CPU's allocator, in order."""
    found = [(event.start_ns(), event.nbytes()) for event in _events(recorded) if event.name() == "[memory]"]
    return sorted(found, key=lambda change: change[0])


def measured_seconds(bench: Bench, *, steps: int = 5, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each of `steps` steps over rows of their own, after one to warm up."""
    found = []
    for number in range(steps + 1):
        bench.renew(number)
        start = clock()
        bench.step()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        found.append(clock() - start)
    return found[1:]


def _memory_events() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _events(recorded: profile) -> list[Any]:
    results = getattr(recorded.profiler, "kineto_results", None)
    return [] if results is None else list(results.events())


def _cuda_peak(config: ModelConfig, work: Work, device: torch.device, steps: int) -> Measured:
    bench = open_bench(config, work, device)
    torch.cuda.synchronize(device)
    resting = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        bench.step()
    torch.cuda.synchronize(device)
    return Measured(torch.cuda.max_memory_allocated(device), resting)
