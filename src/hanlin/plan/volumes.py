"""What the textbooks say an optimizer step sends, by axis; `plan.communication` has the exact bytes of this code.

    tensor     4 b s h numbers a layer: a sum after attention and one after the feed-forward, both ways
               (arXiv:1909.08053); with sequence parallelism a gather and a scatter in the place of each sum, the same
               bytes on the wire (arXiv:2205.05198)
    pipeline   2 (P - 1) b s h over all ranks: a state at each of the P - 1 borders, both ways
    ring       (C - 1) blocks of keys and values a layer forward; backward as many, and their gradients
               (arXiv:2310.01889)
    ulysses    q, k, v and the output change from tokens to heads and back: 4 exchanges a layer each way
               (arXiv:2309.14509)
    expert     a token goes to its k experts and comes back: 4 k b s h a layer over both ways (arXiv:2006.16668)
    replicas   DDP one sum of Phi (2 Phi on the wire); ZeRO-1 and ZeRO-2 scatter gradients and gather weights: 2 Phi;
               ZeRO-3 gathers twice and scatters once: 3 Phi (arXiv:1910.02054); LoRA's Phi is A and B, but ZeRO-3
               gathers the frozen layers, too, for each forward and each backward

Wire bytes are what one rank sends: (n - 1) / n of the payload of a gather, scatter or exchange, twice that for a sum.
"""

from dataclasses import dataclass

from hanlin.models.config import ExpertsConfig, LatentAttentionConfig, LayerConfig
from hanlin.parallel.settings import Layout
from hanlin.plan.closed import Job, lora_numbers, micro_batches, weight_rates


@dataclass(frozen=True)
class Volume:
    """Of one rank in one optimizer step. payload: bytes of the tensors; wire: bytes that it sends; calls."""

    payload: float
    wire: float
    calls: float

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(self.payload + other.payload, self.wire + other.wire, self.calls + other.calls)


def all_reduce(payload: float, ranks: int, calls: float = 1.0) -> Volume:
    """A ring: a scatter of sums and a gather."""
    return Volume(payload, 2 * (ranks - 1) / ranks * payload, calls)


def one_way(payload: float, ranks: int, calls: float = 1.0) -> Volume:
    """An all-gather (payload: what comes out), a reduce-scatter (what goes in) or an all-to-all (what a rank gives)."""
    return Volume(payload, (ranks - 1) / ranks * payload, calls)


def volumes(job: Job, layout: Layout) -> dict[str, Volume]:
    """{axis: what a rank of the busiest pipeline place sends} for the axes that have several ranks."""
    m = micro_batches(job, layout)
    share = job.sizes.share(layout, job.sizes.busiest(layout, job.length))
    state = job.micro_batch * job.length / layout.context * job.config.width * job.itemsize  # b s h, in bytes
    again = 0.5 if job.recompute == "full" else 0.0  # the forward pass once more
    found: dict[str, Volume] = {}
    if layout.tensor > 1:
        sums = (4.0 + 4 * again) * share.layers + 2.0
        found["tensor"] = (
            one_way(2 * sums * state * m, layout.tensor, 2 * sums * m)
            if layout.sequence
            else all_reduce(sums * state * m, layout.tensor, sums * m)
        )
    if layout.context > 1:
        exchange = _ring if layout.context_kind == "ring" else _ulysses
        total = Volume(0.0, 0.0, 0.0)
        for kind, count in share.kinds.items():
            total += exchange(job, layout, job.sizes.kinds[kind], count * m * (1 + again / 1.5))
        found[layout.context_kind] = total
    if layout.expert > 1:
        total = Volume(0.0, 0.0, 0.0)
        for kind, count in share.kinds.items():
            f, passes = job.sizes.kinds[kind].feed_forward, (4.0 + 4 * again) * m * count
            if isinstance(f, ExpertsConfig):
                total += one_way(passes * f.router.top_k * state, layout.expert, passes)
        found["expert"] = total
    if layout.pipeline > 1:
        borders = 2.0 * layout.stages_a_rank * m
        found["pipeline"] = Volume(borders * state, borders * state, borders)
    if (layout.data or 1) * layout.context > 1:
        found["replicas"] = _replicas(job, layout, m)
    return found


def _ring(job: Job, layout: Layout, layer: LayerConfig, passes: float) -> Volume:
    heads, key, value = layer.attention.kv_shape
    tokens = job.micro_batch * job.length / layout.context
    numbers = (layout.context - 1) * tokens * max(1.0, heads / layout.tensor) * (key + value)
    sent = numbers * (2 * job.itemsize + 4) * passes  # forward; backward, and fp32 gradients that travel along
    return Volume(sent, sent, 3 * (layout.context - 1) * passes)


def _ulysses(job: Job, layout: Layout, layer: LayerConfig, passes: float) -> Volume:
    a = layer.attention
    heads, key, value = a.kv_shape
    out = a.kv_rank if isinstance(a, LatentAttentionConfig) else value
    kept = max(heads / layout.tensor, layout.context)  # a key head goes to every rank that has queries of it
    numbers = a.heads / layout.tensor * (key + out) + kept * (key + value)
    tokens = job.micro_batch * job.length / layout.context
    return one_way(2 * tokens * numbers * job.itemsize * passes, layout.context, 4 * passes)


def _replicas(job: Job, layout: Layout, m: int) -> Volume:
    share = job.sizes.share(layout, job.sizes.busiest(layout, job.length))
    replicas = (layout.data or 1) * layout.context
    size = 2.0 if job.masters and job.precision != "fp32" else 4.0
    if job.method != "full":
        trained = lora_numbers(job.sizes, job.rank) / (layout.pipeline * layout.tensor)
        parts = [(trained, replicas)]
        calls = 1.0
    else:
        parts = [(share.dense, replicas), (share.experts, replicas // layout.expert)]
        calls = 2.0 * share.layers
    total = Volume(0.0, 0.0, 0.0)
    for numbers, ranks in parts:
        if ranks < 2 or not numbers:
            continue
        phi = numbers * size
        if layout.shard == "none":
            total += all_reduce(phi, ranks, calls)
        elif layout.shard == "zero1":
            total += one_way(2 * phi, ranks, 2 * calls)
        elif layout.shard == "zero2":
            total += one_way((m + 1) * phi, ranks, (m + 1) * calls)
        else:
            total += one_way(3 * m * phi, ranks, 3 * m * calls)
    if job.method != "full" and layout.shard == "zero3":  # frozen layers: for each forward and each backward
        layer, rest = weight_rates(job)
        outside = share.embedding + share.head
        for numbers, ranks in ((share.dense - outside, replicas), (share.experts, replicas // layout.expert)):
            if ranks > 1 and numbers:
                total += one_way(2 * m * layer * numbers, ranks, 2 * m * share.layers)
        total += one_way(rest * outside, replicas) if replicas > 1 else Volume(0.0, 0.0, 0.0)
    return total
