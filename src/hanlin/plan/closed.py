"""The memory of one rank as a closed form, for searching thousands of layouts; `plan.memory` is the exact count.

    weights      w Phi_rank                   w, g, o bytes a parameter: 4, 4, 8 (fp32 weights, AdamW), or with
    gradients    g Phi_rank                   half-precision weights 2, 2, 12; ZeRO divides o, g, w by the replicas
    optimiser    o Phi_rank                   (stages 1, 2, 3), for experts by the replicas that hold the same ones
    casts        2 bytes for each number of a matrix, kept for backward, where 16-bit products read fp32 weights: by
                 each micro-batch in flight
    activations  of the micro-batches in flight: `Sizes.stored` / context, what lies between two products cut by tensor
                 ranks besides, what a norm reads by sequence ranks; recomputed: a layer's input (full) and the results
                 of its products and attention (selective), and one layer while it is made again
    loss         the logits of a chunk of tokens, their slope, the head's gradient
    buffers      what is gathered (ZeRO-3), sent and received, buckets of gradients, gradients in flight in one layer

LoRA holds the weights once in 16 bits (QLoRA: NF4, 0.5 bytes and fp32 scales of blocks of 64 quantised to 8 bits:
0.127 bits a number, arXiv:2305.14314) and gradients and states of A and B alone.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from hanlin.models.config import ExpertsConfig, ModelConfig
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
    that are cast on use (4 + 4 + 8), which is what `hanlin train` does. average: bytes a trained parameter of
    `train.average` (fp32: 4)."""

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
    average: float = 0.0

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


def weight_rates(job: Job) -> tuple[float, float]:
    """Bytes of a number as it is stored and gathered: (in a layer, in embedding and head)."""
    if job.method == "full":
        size = 2.0 if job.masters and job.precision != "fp32" else 4.0
        return size, size
    return (2.0 if job.method == "lora" else NF4_BYTES), 2.0


def closed_memory(job: Job, layout: Layout, place: int = 0) -> dict[str, float]:
    """Bytes by category on a rank of pipeline place `place` at the fullest of three moments: the loss, the backward of
    the first layers to have theirs, and its end; layout with `data` filled in."""
    share, alone = job.sizes.share(layout, place), micro_batches(job, layout) == 1
    states, rows = _states(job, layout, share), in_flight(job, layout, place)
    layers, many = _layers(job, layout, share), Counter(share.kinds)
    if share.last and job.config.predict_ahead:
        many[job.sizes.decoder[-1]] += job.config.predict_ahead
    kept = sum(many[k] * layer.kept for k, layer in layers.items())
    casts = sum(many[k] * layer.casts for k, layer in layers.items()) if job.recompute == "none" else 0.0
    if job.recompute == "none" and share.head:
        casts += _cast(job) * share.head
    busy = max(layers.values(), key=lambda layer: layer.busy)
    states["buffers"] = _buffers(job, layout, share)
    held = states | {"activations": rows * kept, "casts": rows * casts, "loss": 0.0}
    back = {"activations": busy.again, "casts": busy.casts_again, "buffers": busy.gradients}
    moments = []
    if share.last:
        empty = {"gradients": -states["gradients"]} if alone else {}
        moments.append(_plus(held, {"loss": _loss(job, layout)} | empty))
    if share.last and job.config.predict_ahead and job.method == "full":  # its layer, between both losses' gradients
        back["loss"] = 4.0 * (1 + job.config.predict_ahead) * job.config.vocab_size / layout.tensor * job.config.width
    early = states["gradients"] * (share.head / share.total - 1.0) if alone else 0.0
    moments.append(_plus(held, back | {"gradients": early}))
    others = {"activations": -kept, "casts": -casts}
    table = 4.0 * share.embedding if job.method == "full" else 0.0
    moments.append(_plus(held, others | {"buffers": table}))
    if alone:  # all gradients, and the last of the layers
        one = {"activations": busy.kept + busy.again - kept, "casts": busy.casts - casts, "buffers": busy.gradients}
        moments.append(_plus(held, one))
    return max(moments, key=lambda moment: sum(moment.values()))


def _plus(held: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return {name: size + more.get(name, 0.0) for name, size in held.items()}


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
        rate = frozen_bytes(job.sizes, job.method) / job.sizes.total
        held = rate * share.dense / (replicas if stage == 3 else 1)
        held += rate * share.experts / (replicas / layout.expert if stage == 3 else 1)
        trained = job.rank * sum(job.sizes.layer[k].adapted * n for k, n in share.kinds.items()) / layout.tensor
        gradients = 4.0 * trained / (replicas if stage >= 2 else 1)
        optimiser = (job.states + job.average) * trained / (replicas if stage >= 1 else 1)
        weights = held + 4.0 * trained / (replicas if stage == 3 else 1)
        return {"weights": weights, "gradients": gradients, "optimiser": optimiser}
    halves = job.masters and job.precision != "fp32"
    w, g, o = (2.0, 2.0, job.states + 4.0) if halves else (4.0, 4.0, job.states)
    o += job.average
    found = {"weights": 0.0, "gradients": 0.0, "optimiser": 0.0}
    for numbers, copies in ((share.dense, replicas), (share.experts, replicas / layout.expert)):
        found["weights"] += w * numbers / (copies if stage == 3 else 1)
        found["gradients"] += g * numbers / (copies if stage >= 2 else 1)
        found["optimiser"] += o * numbers / (copies if stage >= 1 else 1)
    return found


@dataclass(frozen=True)
class _Layer:
    """Bytes of one micro-batch in one layer. kept: for backward; casts: of its weights; again, casts_again: what comes
    when it is made again; gradients: in flight at the fullest moment of its backward."""

    kept: float
    casts: float
    again: float
    casts_again: float
    gradients: float

    @property
    def busy(self) -> float:
        return self.again + self.casts_again + self.gradients


def _cast(job: Job) -> float:
    """Bytes of a weight's cast."""
    return 2.0 if job.method == "full" and not job.masters and job.precision != "fp32" else 0.0


def _layers(job: Job, layout: Layout, share: Share) -> dict[int, _Layer]:
    """Of each kind. Whole on every tensor rank: what the products read, and the rows of routed experts: what they give,
    and what they get where it travels."""
    sizes, t, tokens = job.sizes, layout.tensor, job.length / layout.context * job.micro_batch
    stored, results = sizes.stored(job.itemsize), sizes.results(job.itemsize)
    state = tokens * job.config.width * job.itemsize
    own = state / (t if layout.sequence else 1)  # what a norm reads
    found = {}
    for k in share.kinds:
        rows, routing = state * sizes.chosen(k), tokens * sizes.routing(k)
        inner = (tokens * stored[k] - 4 * state - rows - routing) / t
        whole = inner + 2 * state + 2 * own + (2 if layout.expert > 1 else 1) * rows + routing
        kept = {
            "none": whole,
            "selective": own + tokens * (results[k][0] / t + results[k][1]) + routing,
            "full": own + routing,
        }[job.recompute]
        size = sizes.layer[k]
        casts = _cast(job) * (size.cut / t + size.whole + size.experts / (t * layout.expert))
        again = job.recompute != "none"
        gradients = _gradients_in_flight(job, layout, k, tokens)
        found[k] = _Layer(kept, casts, max(0.0, whole - kept), casts * again, gradients)
    return found


def _gradients_in_flight(job: Job, layout: Layout, kind: int, tokens: float) -> float:
    """Of the feed-forward, where they are most: either those of the hidden units or those of the weights, less what is
    given back by then. Of experts both at once, since they have a backward of their own. Where tensor ranks share all
    that: four states."""
    f, width, item, cast = job.sizes.kinds[kind].feed_forward, job.config.width, job.itemsize, _cast(job)
    ways, trained = (2 if f.gated else 1), job.method == "full"
    states = tokens * width * item
    sums = 4.0 if cast else 0.0  # beside the cast's gradient that of the weight
    if isinstance(f, ExpertsConfig):
        rows, hidden = states * f.router.top_k, tokens * f.router.top_k * f.hidden * item / layout.tensor
        matrix = f.count * f.hidden * width / (layout.tensor * layout.expert) * trained
        numbers = (ways + 1) * matrix
        summed = item * numbers + sums * ways * matrix - cast * numbers - rows - ways * hidden
        return max(4 * states, item * numbers + rows + ways * hidden + states, summed)
    hidden, matrix = tokens * f.hidden * item / layout.tensor, f.hidden * width / layout.tensor * trained
    return max(4 * states, (ways + 1) * hidden - cast * matrix, (ways * item + sums - cast) * matrix - hidden)


def _loss(job: Job, layout: Layout) -> float:
    vocabulary = job.config.vocab_size / layout.tensor
    tokens = job.length / layout.context * job.micro_batch
    rows = min(tokens, CHUNK_ROWS, max(1, CHUNK_LOGITS // vocabulary))
    head = 8.0 + (2.0 if job.itemsize == 2 else 0.0)  # its gradient's sum, a chunk's part of it, a cast of its weight
    if job.method != "full":  # frozen, and held in 16 bits
        head = 0.0
    return rows * vocabulary * 8.0 + head * vocabulary * job.config.width


def _buffers(job: Job, layout: Layout, share: Share) -> float:
    """What is sent and received: states at the borders of a pipeline, the next keys and values of a ring, rows of
    experts out and back, buckets of gradients; under ZeRO-3 two layers whole, the one at work and the one that is on
    its way, and through the whole step embedding, head and what predicts ahead."""
    replicas, t, e = (layout.data or 1) * layout.context, layout.tensor, layout.tensor * layout.expert
    tokens = job.length / layout.context * job.micro_batch
    state = tokens * job.config.width * job.itemsize
    total = 2 * state if layout.pipeline > 1 else 0.0
    if layout.context > 1 and layout.context_kind == "ring":
        shapes = [job.sizes.kinds[k].attention.kv_shape for k in share.kinds]
        total += 2 * tokens * job.itemsize * max(max(1.0, n / t) * (key + value) for n, key, value in shapes)
    if layout.expert > 1:
        total += 2 * state * max(job.sizes.chosen(k) for k in share.kinds)
    if replicas == 1:
        return total
    trained = share.total if job.method == "full" else 0.0
    total += 2 * 4.0 * min(BUCKET, trained)
    if layout.shard == "zero3":
        sizes = (job.sizes.layer[k] for k in share.kinds)
        unit = max(size.cut / t + size.whole + size.experts / e for size in sizes)
        layer, rest = weight_rates(job)
        total += 2 * layer * unit + rest * (share.embedding + share.head)
        if share.last and job.config.predict_ahead:
            size = job.sizes.layer[job.sizes.decoder[-1]]
            total += layer * job.config.predict_ahead * (size.cut / t + size.whole + size.experts / e)
    return total
