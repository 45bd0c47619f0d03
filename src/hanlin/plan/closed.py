"""The memory of one rank as a closed form, for searching thousands of layouts; `plan.memory` is the exact count.

    weights      w Phi_rank                   w, g, o bytes a parameter: 4, 4, 8 (fp32 weights, AdamW), or with
    gradients    g Phi_rank                   half-precision weights 2, 2, 12; ZeRO divides o, g, w by the replicas
    optimiser    o Phi_rank                   (stages 1, 2, 3), for experts by the replicas that hold the same ones
    casts        2 bytes for each number of a matrix, kept for backward, where 16-bit products read fp32 weights: by
                 each micro-batch in flight
    activations  of the micro-batches in flight: plan.formulas.layer_activations_modern / context, what lies between two
                 products cut by tensor ranks besides, what a norm reads by sequence ranks
    loss         the logits of a chunk of tokens, their slope, the head's gradient
    buffers      what is gathered for a unit (ZeRO-3), buckets of gradients

LoRA holds the weights once in 16 bits (QLoRA: NF4, 0.5 bytes and fp32 scales of blocks of 64 quantised to 8 bits:
0.127 bits a number, arXiv:2305.14314) and gradients and states of A and B alone.
"""

from dataclasses import dataclass
from typing import Any, Literal

from hanlin.models.config import ModelConfig
from hanlin.parallel.settings import Layout
from hanlin.plan.formulas import Recompute
from hanlin.plan.shares import Share, Sizes

Method = Literal["full", "lora", "qlora"]
Precision = Literal["fp32", "bf16", "fp16", "fp8"]
NF4_BYTES = 0.5 + 0.127 / 8
CHUNK_LOGITS, CHUNK_ROWS = 2**26, 512  # `nn.chunked_head`
BUCKET = 1 << 24  # numbers


@dataclass(frozen=True)
class Job:
    """What one optimizer step is to do. batch: rows over all ranks; length: tokens a row; micro_batch: rows of one
    backward on one rank. masters: half-precision weights with an fp32 copy (2 + 2 + 12 bytes), instead of fp32 weights
    that are cast on use (4 + 4 + 8), which is what `hanlin train` does."""

    sizes: Sizes
    batch: int
    length: int
    micro_batch: int = 1
    precision: Precision = "bf16"
    states: float = 8.0  # optimizer's bytes a parameter: AdamW 8, 8-bit AdamW 2, SGD with momentum 4, Muon 4
    recompute: Recompute = "none"
    method: Method = "full"
    rank: int = 8
    masters: bool = False

    @classmethod
    def of(cls, config: ModelConfig, batch: int, length: int, **rest: Any) -> "Job":
        """From a config instead of its sizes."""
        return cls(Sizes(config), batch, length, **rest)

    @property
    def config(self) -> ModelConfig:
        return self.sizes.config

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.batch * self.length


def lora_numbers(sizes: Sizes, rank: int) -> int:
    """A and B of every matrix of attention and dense or shared feed-forward (not router, experts, embedding, head)."""
    return rank * sizes.adapted


def frozen_bytes(sizes: Sizes, method: Method) -> float:
    """Of the weights that LoRA leaves alone: 16 bits, or NF4 for the matrices of the layers and 16 bits for the rest
    (embedding, head, norms, router)."""
    if method == "lora":
        return 2.0 * sizes.total
    return NF4_BYTES * sizes.matrices + 2.0 * (sizes.total - sizes.matrices)


def closed_memory(job: Job, layout: Layout, place: int = 0) -> dict[str, float]:
    """Bytes by category on a rank of pipeline place `place`; layout with `data` filled in."""
    share = job.sizes.share(layout, place)
    found = _states(job, layout, share)
    rows = in_flight(job, layout, place)
    found["activations"] = rows * _activations(job, layout, share)
    found["casts"] *= rows  # every micro-batch in flight keeps its own
    found["loss"] = _loss(job, layout) if share.last else 0.0
    found["buffers"] = _buffers(job, layout, share)
    return found


def micro_batches(job: Job, layout: Layout) -> int:
    """Backward passes of a rank in one optimizer step."""
    return max(1, job.batch // ((layout.data or 1) * job.micro_batch))


def in_flight(job: Job, layout: Layout, place: int) -> float:
    """Micro-batches whose activations a rank holds at once, in units of its whole share of layers."""
    m, p, v = micro_batches(job, layout), layout.pipeline, layout.stages_a_rank
    if p == 1:
        return 1.0
    if layout.schedule == "naive":
        return 1.0
    if layout.schedule == "gpipe":
        return float(m)
    if v == 1:
        return float(min(m, p - place))
    warm = 2 * (p - place - 1) + (v - 1) * p + 1  # of stages, each a v-th of the share (arXiv:2104.04473)
    return min(m * v, warm) / v


def _states(job: Job, layout: Layout, share: Share) -> dict[str, float]:
    stage = ("none", "zero1", "zero2", "zero3").index(layout.shard)
    replicas = (layout.data or 1) * layout.context
    if job.method != "full":
        held = frozen_bytes(job.sizes, job.method) / job.sizes.total * share.total
        trained = job.rank * sum(job.sizes.layer[k].adapted * n for k, n in share.kinds.items()) / layout.tensor
        held = held / (replicas if stage == 3 else 1) + 4.0 * trained
        return {"weights": held, "gradients": 4.0 * trained, "optimiser": job.states * trained, "casts": 0.0}
    halves = job.masters and job.precision != "fp32"
    w, g, o = (2.0, 2.0, job.states + 4.0) if halves else (4.0, 4.0, job.states)
    found = {"weights": 0.0, "gradients": 0.0, "optimiser": 0.0}
    for numbers, copies in ((share.dense, replicas), (share.experts, replicas / layout.expert)):
        found["weights"] += w * numbers / (copies if stage == 3 else 1)
        found["gradients"] += g * numbers / (copies if stage >= 2 else 1)
        found["optimiser"] += o * numbers / (copies if stage >= 1 else 1)
    cast = 0.0 if halves or job.precision == "fp32" or job.recompute == "full" else 2.0
    found["casts"] = cast * (share.total - share.embedding)
    return found


def _activations(job: Job, layout: Layout, share: Share) -> float:
    """Of one micro-batch through a rank's layers. Whole on every tensor rank: what the products read, and the rows of
    routed experts: what they give, and what they get where it travels."""
    stored, tokens = job.sizes.stored(job.itemsize), job.length / layout.context * job.micro_batch
    state = tokens * job.config.width * job.itemsize
    cut = layout.tensor if layout.sequence else 1
    layer = {}
    for k in share.kinds:
        rows = state * job.sizes.chosen(k)
        inner = (tokens * stored[k] - 4 * state - 2 * rows) / layout.tensor
        layer[k] = inner + 2 * state + 2 * state / cut + (2 if layout.expert > 1 else 1) * rows
    if job.recompute != "full":
        return sum(n * layer[k] for k, n in share.kinds.items())
    again = max(layer.values(), default=0.0) / max(
        1.0, in_flight(job, layout, 0)
    )  # one is alive while it is made again
    return share.layers * state / cut + again


def _loss(job: Job, layout: Layout) -> float:
    vocabulary = job.config.vocab_size / layout.tensor
    tokens = job.length / layout.context * job.micro_batch
    rows = min(tokens, CHUNK_ROWS, max(1, CHUNK_LOGITS // vocabulary))
    head = 8.0 + (2.0 if job.itemsize == 2 else 0.0)  # its gradient's sum, a chunk's part of it, a cast of its weight
    return rows * vocabulary * 8.0 + head * vocabulary * job.config.width


def _buffers(job: Job, layout: Layout, share: Share) -> float:
    """Buckets, and two units whole under ZeRO-3: the one at work and the one that is on its way."""
    replicas = (layout.data or 1) * layout.context
    if replicas == 1 or job.method != "full":
        return 0.0
    if layout.shard != "zero3":
        return 2 * 4.0 * min(BUCKET, share.total)
    t, e = layout.tensor, layout.tensor * layout.expert
    sizes = (job.sizes.layer[k] for k in share.kinds)
    unit = max((size.cut / t + size.whole + size.experts / e for size in sizes), default=0.0)
    return 2 * 4.0 * unit + 4.0 * max(share.embedding, share.head)
