"""The fastest layout that fits: every way to lay a job over N devices, and why the others fail.

    for each  pipeline x data x context x tensor = N,  expert | data,  ZeRO stage, schedule, recompute, rows at once:
        can it be cut?      heads, hidden units, experts, layers, tokens, rows must divide
        does it fit?        closed_memory of every pipeline place <= memory - reserve
        how fast is it?     step_time

A layout that fails is counted under its first reason. Of the layouts that use the same axes the fastest that fits
stands for all, so that the next two are other ideas and not the same one again.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig, ModelConfig
from hanlin.parallel.settings import Layout
from hanlin.plan.closed import Job, closed_memory
from hanlin.plan.devices import GIB, Cluster
from hanlin.plan.formulas import Recompute
from hanlin.plan.step_time import Assumptions, StepTime, step_time

Shard = Literal["none", "zero1", "zero2", "zero3"]
SHARDS: tuple[Shard, ...] = ("none", "zero1", "zero2", "zero3")
RESERVE = 2.0 * GIB  # what the driver, the communication library and fragments take
MOST_ROWS = 8  # of one micro-batch that are tried


@dataclass(frozen=True)
class Candidate:
    """A layout and how it is run. memory: bytes by category on the fullest pipeline place."""

    layout: Layout
    job: Job
    memory: dict[str, float]
    time: StepTime

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Found:
    """best: those that fit, fastest first, one for each set of axes; failed: {reason: how many variants};
    nearest: the variant that needs the least memory, where none fits; tried: variants in all; fitting: all that fit."""

    best: list[Candidate]
    failed: dict[str, int]
    nearest: Candidate | None
    tried: int
    fitting: list[Candidate]


def search(
    job: Job, cluster: Cluster, *, reserve: float = RESERVE, assumed: Assumptions | None = None, keep: int = 3,
    recompute: Recompute | None = None, fixed_rows: bool = False,
) -> Found:  # fmt: skip
    """The `keep` fastest layouts of `job` over all devices of `cluster` that leave `reserve` bytes free.

    recompute: this one only; None: none and full are tried. fixed_rows: micro-batches of the job's rows only.
    """
    room = cluster.device.memory - reserve
    failed: Counter[str] = Counter()
    fitting: list[Candidate] = []
    smallest: tuple[float, Layout, Job] | None = None
    tried = 0
    for split in _splits(cluster.world):
        layout = Layout(pipeline=split[0], data=split[1], context=split[2], tensor=split[3], sequence=split[3] > 1)
        plain = layout.model_copy(update={"schedule": "gpipe"})  # schedules are judged one by one
        why = why_not(job if fixed_rows else replace(job, micro_batch=1), plain, cluster)
        if why:
            failed[why] += 1
            tried += 1
            continue
        for variant, work in _variants(job, layout, recompute, fixed_rows):
            tried += 1
            why = why_not(work, variant, cluster)
            if why:
                failed[why] += 1
                continue
            place = fullest(work, variant)
            need = sum(place.values())
            if need > room:
                failed[_short(place, room)] += 1
                if smallest is None or need < smallest[0]:
                    smallest = need, variant, work
                continue
            fitting.append(Candidate(variant, work, place, step_time(work, variant, cluster, assumed)))
    best = fastest(fitting)[:keep]
    nearest = None
    if smallest is not None and not best:
        _, layout, work = smallest
        nearest = Candidate(layout, work, fullest(work, layout), step_time(work, layout, cluster, assumed))
    return Found(best, dict(failed.most_common()), nearest, tried, fitting)


def fastest(candidates: list[Candidate]) -> list[Candidate]:
    """The fastest of each set of axes, in order."""
    found: dict[tuple[bool, ...], Candidate] = {}
    for candidate in candidates:
        axes = used_axes(candidate.layout)
        if axes not in found or candidate.time.seconds < found[axes].time.seconds:
            found[axes] = candidate
    return _plainest_first(sorted(found.values(), key=lambda c: c.time.seconds))


def used_axes(layout: Layout) -> tuple[bool, ...]:
    """Which axes have several ranks."""
    sizes = (layout.pipeline, layout.data or 1, layout.context, layout.tensor, layout.expert)
    return tuple(n > 1 for n in sizes)


def why_not(job: Job, layout: Layout, cluster: Cluster | None = None) -> str | None:
    """The first reason for which this layout cannot run the job at all; None: it can."""
    config, t, c = job.config, layout.tensor, layout.context
    data = layout.data or 1
    experts = [la.feed_forward for la in config.layers if isinstance(la.feed_forward, ExpertsConfig)]
    if cluster is not None and t > cluster.per_node:
        return "tensor groups would span nodes"
    if t > 1 and (why := _uncut(config, t)):
        return why
    if layout.pipeline > 1 and (config.encoder or config.predict_ahead):
        return "a pipeline with an encoder" if config.encoder else "a pipeline with modules that predict ahead"
    if layout.pipeline * layout.stages_a_rank > len(config.layers):
        return "more pipeline stages than layers"
    if c > 1 and config.predict_ahead:
        return "context parallelism with modules that predict ahead"
    if c > 1 and layout.context_kind == "ulysses" and any(la.attention.heads // t % c for la in config.layers):
        return "heads do not divide among the ulysses ranks"
    if c > 1 and not all(isinstance(la.attention, AttentionConfig | LatentAttentionConfig) for la in config.layers):
        return "context parallelism needs plain or latent attention"
    if layout.sequence and job.length // c % t:
        return "tokens of a row do not divide among the sequence-parallel ranks"
    if layout.expert > 1 and not experts:
        return "no experts to share"
    if any(f.count % layout.expert for f in experts):
        return "experts do not divide among the expert ranks"
    if job.batch % data:
        return "rows of the batch do not divide among the data ranks"
    if job.batch // data % job.micro_batch:
        return "rows of a rank do not divide into micro-batches"
    return _unordered(layout, job.batch // data // job.micro_batch)


def _unordered(layout: Layout, micro_batches: int) -> str | None:
    """What `parallel.pipeline` refuses of a schedule."""
    p = layout.pipeline
    if p > 1 and layout.schedule == "1f1b" and micro_batches < p:
        return "fewer micro-batches than pipeline ranks"
    several = layout.stages_a_rank > 1 and not (layout.schedule == "zero_bubble" and layout.stages_a_rank == 2)
    if p > 1 and several and micro_batches % max(1, micro_batches // p):
        return "micro-batches that do not fill equal rounds of the pipeline"
    return None


def check_layout(job: Job, layout: Layout, cluster: Cluster) -> None:
    """Refuse a layout that the user gave and that cannot run."""
    why = why_not(job, layout, cluster)
    if why:
        raise HanlinError(f"This layout cannot run {job.config.family} of {len(job.config.layers)} layers: {why}.")


def describe_layout(layout: Layout) -> str:
    """`TP8+SP x PP4 (1f1b) x DP2 zero1`: only what is not 1."""
    parts = []
    if layout.tensor > 1:
        parts.append(f"TP{layout.tensor}" + ("+SP" if layout.sequence else ""))
    if layout.pipeline > 1:
        v = f", {layout.chunks or 2} chunks" if layout.stages_a_rank > 1 else ""
        parts.append(f"PP{layout.pipeline} ({layout.schedule}{v})")
    if layout.context > 1:
        parts.append(f"CP{layout.context} ({layout.context_kind})")
    if layout.expert > 1:
        parts.append(f"EP{layout.expert}")
    if (layout.data or 1) > 1 or not parts:
        parts.append(f"DP{layout.data or 1}")
    if layout.shard != "none":
        parts.append(layout.shard)
    return " x ".join(parts)


def _variants(job: Job, layout: Layout, recompute: Recompute | None, fixed_rows: bool) -> Iterator[tuple[Layout, Job]]:
    data = layout.data or 1
    replicas = data * layout.context
    moe = any(isinstance(la.feed_forward, ExpertsConfig) for la in job.config.layers)
    experts = [e for e in _divisors(data) if e == 1 or moe]
    shards: tuple[Shard, ...] = SHARDS if replicas > 1 else ("none",)
    if layout.pipeline > 1:  # a pipeline runs many backward passes a step: ZeRO-2 and 3 would talk in each
        shards = shards[:2]
    kinds: tuple[Recompute, ...] = (recompute,) if recompute is not None else ("none", "full")
    schedules = ("1f1b", "interleaved", "zero_bubble") if layout.pipeline > 1 else ("1f1b",)
    rows = [r for r in _divisors(max(1, job.batch // data)) if r <= MOST_ROWS]
    rows = [job.micro_batch] if fixed_rows else rows
    contexts = ("ring", "ulysses") if layout.context > 1 else ("ring",)
    for expert, shard, kind, schedule, micro, context in product(experts, shards, kinds, schedules, rows, contexts):
        yield (
            layout.model_copy(update={"expert": expert, "shard": shard, "schedule": schedule, "context_kind": context}),
            replace(job, recompute=kind, micro_batch=micro),
        )


def fullest(job: Job, layout: Layout) -> dict[str, float]:
    """`closed_memory` of the pipeline place that holds most."""
    places = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
    return max((closed_memory(job, layout, place) for place in places), key=lambda m: sum(m.values()))


def _short(memory: dict[str, float], room: float) -> str:
    """What of the memory alone is too much, or the largest part of it."""
    states = memory["weights"] + memory["gradients"] + memory["optimiser"]
    if states > room:
        return "out of memory: weights, gradients and optimiser alone"
    return "out of memory: activations" if memory["activations"] > 0.3 * room else "out of memory: all together"


def _uncut(config: ModelConfig, t: int) -> str | None:
    for layer in (*config.layers, *config.encoder):
        a, f = layer.attention, layer.feed_forward
        if a.heads % t:
            return "heads do not divide among the tensor ranks"
        if isinstance(a, AttentionConfig) and a.kv_heads % t and t % a.kv_heads:
            return "key heads do not divide among the tensor ranks"
        if f.hidden % t or (isinstance(f, ExpertsConfig) and f.shared_hidden % t):
            return "hidden units do not divide among the tensor ranks"
    return None if config.vocab_size >= t else "fewer tokens in the vocabulary than tensor ranks"


def _plainest_first(candidates: list[Candidate]) -> list[Candidate]:
    """By time; among those within one percent of the fastest of them the one with the fewest axes goes first."""
    ordered: list[Candidate] = []
    while candidates:
        near = [c for c in candidates if c.time.seconds <= 1.01 * candidates[0].time.seconds]
        ordered.append(min(near, key=lambda c: (_axes(c.layout), c.time.seconds)))
        candidates = [c for c in candidates if c is not ordered[-1]]
    return ordered


def _axes(layout: Layout) -> float:
    axes = (layout.pipeline, layout.data or 1, layout.tensor, layout.expert)
    return sum(n > 1 for n in axes) + 1.5 * (layout.context > 1)  # rows that are whole are simpler


def _splits(world: int) -> Iterator[tuple[int, int, int, int]]:
    """(pipeline, data, context, tensor) with that product."""
    for p in _divisors(world):
        for d in _divisors(world // p):
            for c in _divisors(world // p // d):
                yield p, d, c, world // p // d // c


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
