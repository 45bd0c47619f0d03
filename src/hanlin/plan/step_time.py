"""How long an optimizer step takes on a given machine: a roofline over products, memory and links.

    products   FLOPs of a rank / (peak x `matmul`), full recompute adds a forward pass
    traffic    bytes that norms, activations, residuals and casts move / (bandwidth x `memory`); selective recompute
               keeps the results of products and attention, and writes and reads again what lies between
    optimiser  (reads of w, g, m, v and writes of w, m, v) / bandwidth
    bubble     a pipeline of P ranks waits (P - 1) / (M v) of the work (arXiv:2104.04473); naive: P - 1 times the work;
               zero bubble: a third of it is left, since gradients of weights fill the rest (arXiv:2401.10241)
    links      wire bytes of an axis / (bytes/s of the slowest link that its group spans x `link`) + calls x `latency`

What overlaps, and is paid only where it is longer than what it hides behind:

    replicas   sums of gradients, and ZeRO's gathers of weights: with the last micro-batch's backward and the next
               forward (ZeRO-1 and 2), with every layer's products (ZeRO-3); `overlap` of that time can be hidden
    ring       with the scores of the part that is there
    pipeline   the sends of one micro-batch with the products of another, where there are several
    tensor, sequence, ulysses and expert exchanges stand between two products: paid in full

    step  = (products + traffic + paid links of layers) x (1 + bubble) + paid rest + optimiser
    MFU   = model FLOPs (without recompute) / (step x world x peak)          (PaLM, arXiv:2204.02311, appendix B)
"""

from dataclasses import dataclass, replace

from hanlin.parallel.settings import Layout
from hanlin.plan.closed import Job, lora_numbers, micro_batches
from hanlin.plan.devices import Cluster
from hanlin.plan.volumes import Volume, volumes


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's figures that good kernels reach, and what a call costs. matmul: of the peak FLOP/s;
    small: tokens of a product below which it falls off (a half at so many); memory, link: of bytes/s; overlap: of the
    time that exchanges may hide behind; latency: seconds a call; passes: how often what is stored for backward moves
    through memory in forward and backward together."""

    matmul: float = 0.70
    small: float = 256.0
    memory: float = 0.85
    link: float = 0.80
    overlap: float = 0.90
    latency: float = 15e-6
    passes: float = 5.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to. links: paid seconds by axis; hidden: those that overlap;
    bubble: seconds of waiting; model_flops: of the step over all ranks."""

    products: float
    traffic: float
    optimiser: float
    bubble: float
    links: dict[str, float]
    hidden: float
    tokens: int
    model_flops: float
    world: int
    peak: float

    @property
    def seconds(self) -> float:
        return self.products + self.traffic + self.optimiser + self.bubble + sum(self.links.values())

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.world * self.peak)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_s * 86400

    def days(self, tokens: float) -> float:
        """To train on so many tokens."""
        return tokens / self.tokens_per_day

    def cost(self, tokens: float, price: float) -> float:
        """At `price` for an hour of one device."""
        return self.days(tokens) * 24 * self.world * price


def step_time(job: Job, layout: Layout, cluster: Cluster, assumed: Assumptions | None = None) -> StepTime:
    """One optimizer step of `job` over all devices of `cluster`; layout with `data` filled in."""
    a = assumed or Assumptions()
    device = cluster.device
    m = micro_batches(job, layout)
    peak = device.peak(job.precision)
    forward, backward = _products(job, layout, peak, a)
    traffic = _traffic(job, layout) * m / (device.bandwidth * a.memory)
    paid, hidden = _links(job, layout, cluster, a, m, forward + backward, backward)
    inner = sum(seconds for axis, seconds in paid.items() if axis != "replicas")
    busy = (forward + backward) * m + traffic + inner
    bubble = busy * bubble_share(layout, m)
    numbers = _stepped(job, layout)
    moved = 20.0 + 2 * job.states - (0 if job.states else 8) + 2 * job.average
    optimiser = numbers * moved / (device.bandwidth * a.memory)
    whole = job.sizes.flops(job.length).total * job.batch
    return StepTime(
        (forward + backward) * m, traffic, optimiser, bubble, paid, hidden, job.tokens,
        (3.0 if job.method == "full" else 2.0) * whole, layout.inner * (layout.data or 1), peak,
    )  # fmt: skip


def bubble_share(layout: Layout, m: int) -> float:
    """Waiting as a multiple of the work of a rank, M micro-batches."""
    p, v = layout.pipeline, layout.stages_a_rank
    if p == 1:
        return 0.0
    if layout.schedule == "naive":
        return p - 1.0
    if layout.schedule == "zero_bubble":
        return (p - 1) / (3.0 * m * v)
    return (p - 1) / (m * v)


def _products(job: Job, layout: Layout, peak: float, a: Assumptions) -> tuple[float, float]:
    """Seconds of the products of one micro-batch on the busiest rank: (forward, backward)."""
    tokens = job.micro_batch * job.length / layout.context
    rate = peak * a.matmul * tokens / (tokens + a.small)
    place = job.sizes.busiest(layout, job.length)
    share = job.micro_batch / (layout.tensor * layout.context)
    one = job.sizes.stage_flops(layout, place, job.length) * share
    again = one if job.recompute == "full" else 0.0
    back = 2.0 * one if job.method == "full" else one  # frozen matrices have no gradient of their own
    return one / rate, (back + again) / rate


def _traffic(job: Job, layout: Layout) -> float:
    """Bytes that one micro-batch moves outside of products on a rank."""
    share = job.sizes.share(layout, job.sizes.busiest(layout, job.length))
    stored = job.sizes.stored(job.itemsize)
    tokens = job.micro_batch * job.length / layout.context
    again = 0.0
    if job.recompute == "selective":
        results = job.sizes.results(job.itemsize)
        again = sum(max(0.0, stored[k] - sum(results[k])) * n for k, n in share.kinds.items()) * tokens
    stored = sum(stored[k] * n for k, n in share.kinds.items()) * tokens
    cast = 0.0 if job.masters or job.precision == "fp32" or job.method != "full" else 6.0 * share.total
    gradients = 8.0 * share.total if job.method == "full" else 0.0  # added up: read and written
    return (stored * Assumptions().passes + 2 * again) / layout.tensor + cast + gradients


def _stepped(job: Job, layout: Layout) -> float:
    """Numbers that a rank's optimiser steps on."""
    share = job.sizes.share(layout, job.sizes.busiest(layout, job.length))
    if job.method != "full":
        return lora_numbers(job.sizes, job.rank) / (layout.pipeline * layout.tensor)
    replicas = (layout.data or 1) * layout.context if layout.shard != "none" else 1
    return share.dense / replicas + share.experts / max(1.0, replicas / layout.expert)


def _links(
    job: Job, layout: Layout, cluster: Cluster, a: Assumptions, m: int, products: float, backward: float
) -> tuple[dict[str, float], float]:
    """(paid seconds by axis, hidden seconds) of a step."""
    paid: dict[str, float] = {}
    hidden = 0.0
    for axis, volume in volumes(job, layout).items():
        seconds = _seconds(volume, axis, layout, cluster, a)
        if axis == "replicas":
            behind = (products * m if layout.shard == "zero3" else backward) * a.overlap
        elif axis == "ring":
            flops = job.sizes.flops(job.length)
            part = sum(flops.scores[k] for k in job.sizes.decoder) / flops.total
            behind = products * m * part * a.overlap
        elif axis == "pipeline":
            behind = 0.0 if m == 1 or layout.schedule == "naive" else products * m * a.overlap
        else:
            behind = 0.0
        paid[axis] = max(0.0, seconds - behind)
        hidden += min(seconds, behind)
    return paid, hidden


def _seconds(volume: Volume, axis: str, layout: Layout, cluster: Cluster, a: Assumptions) -> float:
    span = {
        "tensor": layout.tensor,
        "ring": layout.tensor * layout.context,
        "ulysses": layout.tensor * layout.context,
        "expert": layout.tensor * layout.context * layout.expert,
        "replicas": layout.tensor * layout.context * (layout.data or 1),
        "pipeline": layout.inner * (layout.data or 1),
    }[axis]
    bandwidth = cluster.bandwidth(span)
    if axis == "replicas" and span > cluster.per_node:  # rings inside a node feed all of its network cards at once
        bandwidth = min(cluster.device.link, bandwidth * max(1, cluster.per_node // (layout.tensor * layout.context)))
    if axis == "expert" and span > cluster.per_node:  # what stays in the node goes over its links
        inside = cluster.per_node / span
        bandwidth = 1.0 / (inside / cluster.device.link + (1 - inside) / bandwidth)
    return volume.wire / (bandwidth * a.link) + volume.calls * a.latency


def with_micro_batch(job: Job, rows: int) -> Job:
    """The same work in micro-batches of `rows`."""
    return replace(job, micro_batch=rows)
