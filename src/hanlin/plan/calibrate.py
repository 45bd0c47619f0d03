"""Measures what this machine does in a second, for `plan.seconds`: half a minute, once, kept in the user's cache.

Every kind of operation that a training step is made of is run alone, at several sizes, over buffers that are together
larger than a core's cache, because in a step nobody finds its inputs there. The fastest of several tries counts:
another process can only make one slower.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hanlin.core.device import machine_summary, tune_allocator
from hanlin.core.files import atomic_path
from hanlin.kernels import train_attention, training
from hanlin.kernels.cross_entropy import cross_entropy
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.plan.measure import measured_seconds
from hanlin.plan.seconds import Rates, price
from hanlin.plan.trace import Trace, key_flops, trace_step
from hanlin.plan.work import Work, open_bench

COLD = 1 << 25  # bytes that a probe's buffers have together
SIZES = (1 << 13, 1 << 16, 1 << 19, 1 << 22, 1 << 25)  # bytes of a pass
SHAPES = (
    (64, 64, 64), (64, 128, 128), (64, 128, 512), (64, 512, 128), (64, 512, 512), (256, 64, 256), (256, 256, 256),
    (256, 256, 1024), (256, 1024, 256), (256, 2048, 2048), (1024, 256, 256), (1024, 256, 1024), (1024, 1024, 256),
    (1024, 1024, 1024), (1024, 512, 8192), (1024, 64, 1024), (4096, 256, 512), (4096, 512, 256), (4096, 64, 64),
    (512, 8192, 512), (8192, 512, 512),
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEVER_SEEN = count(257)  # rows of products that this process has not made yet
Clock = Callable[[], float]
VERSION = 1


def known_rates() -> Rates | None:
    """This machine's rates at the present number of threads, if they were measured before."""
    path = _cache()
    return _read(json.loads(path.read_text())) if path.exists() else None


def machine_rates(*, quiet: bool = True, clock: Clock = time.perf_counter) -> Rates:
    """Measured now, and kept for `known_rates`."""
    if not quiet:
        print("Measuring what this machine does in a second (half a minute) ...", file=sys.stderr, flush=True)
    rates = measure_rates(clock=clock)
    path = _cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished:
        Path(unfinished).write_text(json.dumps(_written(rates), indent=1))
    return rates


def measure_rates(*, tries: int = 5, clock: Clock = time.perf_counter) -> Rates:
    """Measure now. About twenty seconds."""
    tune_allocator()
    with torch.no_grad():
        rates = _alone(tries, clock)
    rates = replace(rates, overhead=_overhead(rates, clock))
    for name in DTYPES:  # fp32 first: a step in bf16 has operations in fp32
        rates = replace(rates, within={**rates.within, name: _within(rates, name, clock)})
    return rates


def _alone(tries: int, clock: Clock) -> Rates:
    """Every operation by itself."""
    products: dict[tuple[str, str], list] = {}
    passes: dict[tuple[str, str], list] = {}
    attention: dict[tuple[str, str], list] = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            for kind in ("mm nn", "mm nt", "mm tn"):
                seconds = _fastest(_product(kind, shape, dtype), tries, clock)
                products.setdefault((kind, name), []).append((shape, 2.0 * shape[0] * shape[1] * shape[2] / seconds))
        products["mm tt", name] = products["mm tn", name]
        for kind, size, work in _passes(dtype):
            passes.setdefault((kind, name), []).append((size, _fastest(work, tries, clock)))
        for kind, size, work in _attention(dtype):
            flops = key_flops((kind, name, size))
            attention.setdefault((kind, name), []).append((size, flops / _fastest(work, tries, clock)))
    for name, dtype in DTYPES.items():
        for kind in ("mm nn", "mm nt", "mm tn"):
            passes[f"new {kind}", name] = [(0, _new_shape(kind, dtype, clock))]
    for size, work in _truth_values():
        passes.setdefault(("pointwise", "bool"), []).append((size, _fastest(work, tries, clock)))
    return Rates(products, {k: sorted(v) for k, v in passes.items()}, attention, 0.0, about=machine_summary())


def fastest_of(found: Sequence[Rates]) -> Rates:
    """Of several measurements of one machine, the fastest value of each."""

    def best(table: str, choose: Callable[..., float]) -> dict[tuple[str, str], list]:
        tables = [getattr(rates, table) for rates in found]
        return {
            key: [(at, choose(t[key][i][1] for t in tables)) for i, (at, _) in enumerate(tables[0][key])]
            for key in tables[0]
        }

    overhead = min(rates.overhead for rates in found)
    within = {dtype: min(rates.within[dtype] for rates in found) for dtype in found[0].within}
    return Rates(best("products", max), best("passes", min), best("attention", max), overhead, within, found[0].about)


def _fastest(works: Iterator[Callable[[], Any]], tries: int, clock: Clock) -> float:
    """Seconds of the fastest call; each try takes at least half a millisecond."""
    next(works)()
    start = clock()
    next(works)()
    repeat = max(1, min(200, int(5e-4 / max(clock() - start, 1e-7))))
    best = float("inf")
    for _ in range(tries):
        batch = [next(works) for _ in range(repeat)]
        start = clock()
        for work in batch:
            work()
        best = min(best, (clock() - start) / repeat)
    return best


def _product(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    m, k, n = shape
    item = torch.empty((), dtype=dtype).element_size()
    copies = max(1, min(16, COLD // (item * (m * k + k * n + m * n))))

    def one() -> Callable[[], Tensor]:
        a = torch.randn(k, m).to(dtype).T if kind[3] == "t" else torch.randn(m, k).to(dtype)
        b = torch.randn(n, k).to(dtype).T if kind[4] == "t" else torch.randn(k, n).to(dtype)
        return lambda: a @ b

    return cycle([one() for _ in range(copies)])


def _new_shape(kind: str, dtype: torch.dtype, clock: Clock) -> float:
    """Seconds that a product takes longer the first time that it has so many rows: oneDNN makes code for it. An expert
    seldom has as many rows as in the step before (bf16, 512 x 512: 1 to 3 ms, of which the product is 0.3)."""
    numbers = [next(NEVER_SEEN) for _ in range(24)]
    x, y = (torch.randn(max(256, *numbers), 512).to(dtype) for _ in range(2))
    weight = torch.randn(512, 512).to(dtype)

    def timed(rows: int) -> float:
        start = clock()
        if kind == "mm tn":
            x[:rows].T @ y[:rows]
        else:
            x[:rows] @ (weight.T if kind == "mm nt" else weight)
        return clock() - start

    timed(256)
    first, again = zip(*((timed(rows), timed(rows)) for rows in numbers), strict=True)
    return max(0.0, median(first) - median(again))


def _passes(dtype: torch.dtype) -> Iterator[tuple[str, int, Iterator[Callable[[], Any]]]]:
    """(kind, bytes read and written, calls)."""
    item = torch.empty((), dtype=dtype).element_size()
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    width = 512
    for size in SIZES:
        n = size // item // width * width or width
        bytes_of = n * item
        copies = max(1, min(32, COLD // (2 * bytes_of)))
        xs = [torch.randn(n).to(dtype) for _ in range(copies)]
        ys = [torch.randn(n).to(dtype) for _ in range(copies)]
        rows = [x.view(-1, width) for x in xs]
        index = torch.randint(0, n // width, (n // width,))
        yield "fill", bytes_of, cycle([lambda x=x: torch.zeros_like(x) for x in xs])
        yield "copy", bytes_of + bytes_of * 4 // item // 2 * (1 if other == torch.bfloat16 else 2), cycle(
            [lambda x=x: x.to(other) for x in xs])  # fmt: skip
        yield "pointwise", 3 * bytes_of, cycle([lambda x=x, y=y: x + y for x, y in zip(xs, ys, strict=True)])
        yield "transcendental", 2 * bytes_of, cycle([lambda x=x: torch.sigmoid(x) for x in xs])
        yield "softmax", 2 * bytes_of, cycle([lambda x=x: torch.softmax(x, -1) for x in rows])
        yield "reduce", bytes_of, cycle([lambda x=x: x.sum() for x in xs])
        yield "gather", 2 * bytes_of, cycle([lambda x=x, i=index: x.index_select(0, i) for x in rows])
        yield from _kernel_passes(rows, bytes_of)
        if dtype == torch.float32:
            yield "adam", 7 * bytes_of, cycle([_adam(x) for x in xs[: max(1, copies // 4)]])
            numbers = [torch.randint(0, 64, (n // 2,)) for _ in range(copies)]
            yield "sort", n // 2 * 24, cycle([lambda x=x: x.sort(stable=True) for x in numbers])


def _kernel_passes(rows: list[Tensor], size: int) -> Iterator[tuple[str, int, Iterator[Callable[[], Any]]]]:
    """Hanlin's own, where they can be built: bytes are those of the first input, as the trace counts them."""
    width = rows[0].shape[1]
    if training.swiglu(rows[0]) is None:
        return
    ones, half = torch.ones(width), [row[:, : width // 2].contiguous() for row in rows]
    inverse = torch.ones(len(rows[0]), 1)
    heads = [row.view(1, -1, width // 64, 64) for row in rows]
    table = torch.randn(1, heads[0].shape[1], 1, 64).to(rows[0].dtype)
    targets = torch.zeros(len(rows[0]), dtype=torch.int64)
    yield "train_swiglu", size, cycle([lambda x=x: training.swiglu(x) for x in rows])
    yield "train_swiglu_backward", size, cycle(
        [lambda x=x, g=g: training.swiglu_backward(x, g) for x, g in zip(rows, half, strict=True)])  # fmt: skip
    yield "train_norm", size, cycle([lambda x=x: training.norm(x, ones, 1e-6) for x in rows])
    yield "train_norm_backward", size, cycle(
        [lambda x=x: training.norm_backward(x, ones, inverse, x, of_weight=True) for x in rows])  # fmt: skip
    yield "train_turn", size, cycle([lambda x=x: training.turn(x, table, table, 1.0) for x in heads])
    yield "cross_entropy", size, cycle(
        [lambda x=x: cross_entropy(x, targets, smoothing=0.0, z_loss=0.0, wanted=True) for x in rows])  # fmt: skip
    if rows[0].dtype == torch.bfloat16:
        into = torch.zeros(rows[0].shape)
        yield "train_widen", size, cycle([lambda x=x: training.widen(x, into, add=True) for x in rows])


def _attention(dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, int], Iterator[Callable[[], Any]]]]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for rows, length, heads, width in (
        (8, 128, 4, 32),
        (4, 256, 4, 64),
        (1, 1024, 4, 64),
        (1, 1024, 2, 128),
        (2, 512, 8, 32),
    ):
        q, k, v = (torch.randn(rows, length, heads, width).to(dtype) for _ in range(3))
        pairs = rows * heads * length * (length + 1) // 2
        if train_attention.usable(q):
            shape = train_attention.shape_of(q, k, v, None, width**-0.5, causal=True)
            out, norms = train_attention.attend(q, k, v, None, shape)
            yield "attention", (pairs, width), cycle(
                [lambda q=q, k=k, v=v, s=shape: train_attention.attend(q, k, v, None, s)])  # fmt: skip
            yield "attention back", (pairs, width), cycle([
                lambda q=q, k=k, v=v, s=shape, o=out, n=norms: train_attention.attend_backward(
                    q, k, v, None, s, o, n, o)])  # fmt: skip
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        full = rows * heads * length * length
        out, sums = flash(q, k, v, 0.0, True)
        yield "attention torch", (full, width), cycle([lambda q=q, k=k, v=v: flash(q, k, v, 0.0, True)])
        yield "attention torch back", (full, width), cycle(
            [lambda q=q, k=k, v=v, o=out, n=sums: back(o, q, k, v, o, n, 0.0, True)])  # fmt: skip


def _truth_values() -> Iterator[tuple[int, Iterator[Callable[[], Any]]]]:
    for size in SIZES:
        xs = [torch.rand(size) > 0.5 for _ in range(max(1, min(16, COLD // size // 2)))]
        yield 3 * size, cycle([lambda x=x: x & x for x in xs])


def _adam(x: Tensor) -> Callable[[], Any]:
    weight = torch.nn.Parameter(x.clone())
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return optimizer.step


def _overhead(rates: Rates, clock: Clock) -> float:
    """Seconds of a call beside its work: what a tiny model's step takes more than its operations, for each of them."""
    config, work = _reference(6, 128, 384, 512), Work(1, 64, precision="fp32")
    done = trace_step(config, work)
    return max(0.0, _fastest_step(config, work, 12, clock) - price(done, rates).total) / done.calls


def _within(rates: Rates, dtype: str, clock: Clock) -> float:
    """How many times longer the operations in `dtype` take in a middling model's step than alone."""
    config, work = _reference(3, 320, 896, 6144), Work(4, 192, precision="fp32" if dtype == "fp32" else "bf16")
    done = trace_step(config, work)
    mine = {key: count for key, count in done.counts.items() if key[1] == dtype}
    rest = {key: count for key, count in done.counts.items() if key[1] != dtype}
    left = _fastest_step(config, work, 8, clock) - price(Trace(rest, done.calls), rates).total
    return max(1.0, left / price(Trace(mine, 0), rates).total)


def _reference(depth: int, width: int, hidden: int, vocabulary: int) -> ModelConfig:
    return ModelConfig.uniform(
        "llama", depth=depth, attention=AttentionConfig(width // 32, width // 64, 32), width=width,
        feed_forward=FeedForwardConfig(hidden), vocab_size=vocabulary,
    )  # fmt: skip


def _fastest_step(config: ModelConfig, work: Work, steps: int, clock: Clock) -> float:
    return min(measured_seconds(open_bench(config, work, torch.device("cpu")), steps=steps, clock=clock))


def _cache() -> Path:
    about = json.dumps([VERSION, machine_summary()], sort_keys=True)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hanlin" / "rates" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def _written(rates: Rates) -> dict[str, Any]:
    tables = {"products": rates.products, "passes": rates.passes, "attention": rates.attention}
    rows = {name: [[*key, points] for key, points in table.items()] for name, table in tables.items()}
    return {**rows, "overhead": rates.overhead, "within": dict(rates.within), "about": dict(rates.about)}


def _read(row: dict[str, Any]) -> Rates:
    def table(name: str) -> dict[tuple[str, str], list]:
        return {
            (kind, dtype): [(tuple(at) if isinstance(at, list) else at, value) for at, value in points]
            for kind, dtype, points in row[name]
        }

    return Rates(table("products"), table("passes"), table("attention"), row["overhead"], row["within"], row["about"])
