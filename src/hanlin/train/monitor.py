"""How fast it goes, and how close that is to what the device can do.

    MFU = tokens/s * FLOPs per token / (world * peak FLOP/s)                     (PaLM, arXiv:2204.02311, appendix B)

FLOPs per token is `ModelConfig.flops_per_token`; peak is the data sheet's dense figure for a known GPU and otherwise
the fastest matrix product measured on this device in this dtype. Evaluation and checkpoints are outside the clock.
"""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from hanlin.train.objective import Metrics

PARTS = ("sum", "count")
DATA_SHEETS = {  # name in torch.cuda.get_device_name -> dense bf16 FLOP/s; the first that fits counts
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that `device` reaches in matrix products of `dtype`: the data sheet's, or measured once (about 0.2 s)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in DATA_SHEETS.items():
            if part in name:
                return flops
    return measure_peak(device, dtype)


def measure_peak(device: torch.device, dtype: torch.dtype, *, repeats: int = 7) -> float:
    """2 n^3 / (shortest time of an n x n x n product): n is 1,024 on a CPU, 8,192 on a GPU."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    out = torch.empty_like(a)
    shortest = float("inf")
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(device)
        shortest = min(shortest, time.perf_counter() - start)
    return 2.0 * n**3 / shortest


class Meter:
    """Sums since the last log line: step losses, gradient norms, the objective's (sum, count) pairs, tokens, seconds.

    A checkpoint holds them (`state`), so that a resumed run writes the very lines it would have written. `paused` keeps
    a stretch of time (evaluation, a checkpoint) out of `seconds`.
    """

    def __init__(self) -> None:
        self.reset()
        self._since = time.perf_counter()

    def reset(self) -> None:
        """Begin the next line."""
        self.steps, self.tokens = 0, 0
        self.seconds, self.loss, self.norm = 0.0, 0.0, 0.0
        self.metrics: Metrics = {}

    def add(self, tokens: int, loss: float, norm: float, metrics: Metrics) -> None:
        """Count one optimizer step. metrics: this rank's."""
        self.steps += 1
        self.tokens += tokens
        self.loss += loss
        self.norm += norm
        add_metrics(self.metrics, metrics)

    def start(self) -> None:
        """The clock runs from now."""
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Generator[None]:
        """What happens inside takes no time."""
        self.seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self.start()

    def means(self, metrics: Metrics) -> dict[str, float]:
        """What a line says: `loss` (the objective's own where it has one, else the mean over steps), `grad_norm`, and
        the objective's metrics. metrics: this meter's, summed over ranks."""
        found = {"loss": self.loss / self.steps, "grad_norm": self.norm / self.steps}
        return found | {name: total / count for name, (total, count) in metrics.items() if count}

    def state(self, metrics: Metrics) -> dict[str, Any]:
        """JSON for a checkpoint. metrics: this meter's, summed over ranks."""
        plain = {name: getattr(self, name) for name in ("steps", "tokens", "seconds", "loss", "norm")}
        pairs = sorted(metrics.items())
        sums = {f"{name}/{part}": float(v) for name, pair in pairs for part, v in zip(PARTS, pair, strict=True)}
        return plain | {"metrics": sums}

    def load(self, state: Mapping[str, Any], *, metrics: bool = True) -> None:
        """Take over what `state` gave. metrics: on one rank only, because the sums are all ranks' together."""
        for name in ("steps", "tokens", "seconds", "loss", "norm"):
            setattr(self, name, state[name])
        self.metrics = _pairs(state["metrics"]) if metrics else {}


def add_metrics(total: Metrics, more: Metrics) -> None:
    """Add (sum, count) pairs by name, into `total`."""
    for name, (value, count) in more.items():
        before = total.get(name, (0.0, 0.0))
        total[name] = (before[0] + value, before[1] + count)


def _pairs(sums: Mapping[str, float]) -> Metrics:
    names = [name.removesuffix("/sum") for name in sums if name.endswith("/sum")]
    return {name: (sums[f"{name}/sum"], sums[f"{name}/count"]) for name in names}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
