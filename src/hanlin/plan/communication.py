"""Every byte that a rank gives in one optimizer step, exactly: op by op, as `parallel.tracer.Tracer` counts it.

Payload is numel x itemsize of a call: of an all-gather the output, of a reduce-scatter the input, of a message what is
sent, of everything else the input; padding, norms and counts included. Which calls there are is said by the files that
make them: `parallel.data`, `zero`, `crossing`, `sequence`, `vocabulary`, `pipeline`, `context`, `ring`, `ulysses`,
`expert`, and `train.cluster` for the numbers of a step. Wire bytes are those of rings, as in the tracer.

    b = rows of a micro-batch    t = tokens of a row here    h = width    M micro-batches
    w, i = bytes of a weight and of an activation

    axis        M times each, without recompute (which repeats what the forward pass of a layer sends, but its last sum)
    tensor      a layer: S forward, S backward for attention and for each feed-forward, S = b t h i; what latent
                attention and routers have beside; norms of heads: their gradient; embedding b t h w; loss 12 bytes
                a trained token (24 in fp64) and S
    sequence    2 gathers and 2 scatters of S a layer and way; gradients of norms; S for the last hidden states
    pipeline    `stages.sends` states of S; the gradient of a tied embedding once; the loss, one number
    context     `ring`, `ulysses`: their docstrings; expert: `expert`, its docstring
    replicas    gradients once (none), `zero`: its docstring; experts over the ranks that hold the same ones
    step        (denominators + 2) fp64 numbers over all ranks, the loss over the replicas, the squared norm in fp64
                where ranks hold different gradients, routers' loads; `plan.matrices`: what Muon gathers
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from hanlin.parallel.settings import Layout
from hanlin.parallel.stages import sends
from hanlin.plan.held import Held, held_by
from hanlin.plan.matrices import gathered_matrices


@dataclass(frozen=True)
class Sent:
    """Calls of one kind. axis and what: for people; op: as the tracer names it; payload: bytes of all of them; calls;
    ranks: of the group."""

    axis: str
    what: str
    op: str
    payload: int
    calls: int
    ranks: int

    @property
    def wire(self) -> float:
        """Bytes that this rank sends, in rings."""
        n = self.ranks
        if self.op == "all_reduce":
            return self.payload * 2 * (n - 1) / n
        return float(self.payload) if self.op == "send" else self.payload * (n - 1) / n


@dataclass(frozen=True)
class StepShape:
    """What a step moves. rows, length: of one micro-batch and a whole row on a data rank; micro_batches; activation,
    weight: bytes of a number; recompute: every layer runs its forward again; trained: tokens with a target on this rank
    in all micro-batches (None: all but the last of each row), which the loss over a cut vocabulary exchanges; arrived:
    rows that this rank's experts get in one forward pass of all layers and micro-batches (None: an even share); muon:
    whether the optimiser is Muon, which needs whole matrices."""

    rows: int
    length: int
    micro_batches: int = 1
    activation: int = 4
    weight: int = 4
    recompute: bool = False
    trained: int | None = None
    arrived: int | None = None
    muon: bool = False

    @property
    def loss(self) -> int:
        """Bytes of a number of the loss."""
        return max(4, self.activation)


def step_traffic(
    config: ModelConfig, shape: StepShape, layout: Layout, *, pipeline: int = 0, tensor: int = 0
) -> list[Sent]:
    """All calls of the rank at these places in one optimizer step of the `Trainer` (full training, no log line).

    layout: with `data` filled in. What is not counted yet (an encoder, cross-attention) is a `HanlinError`.
    """
    if config.encoder or any(layer.cross_attention is not None for layer in config.layers):
        raise HanlinError("The bytes of a model with an encoder are not counted; plan a decoder or an encoder alone.")
    if config.predict_ahead and layout.tensor > 1:
        raise HanlinError("The bytes of modules that predict ahead are not counted under tensor parallelism.")
    held = held_by(config, layout, pipeline=pipeline, tensor=tensor)
    found: list[Sent] = []
    if layout.tensor > 1:
        found += _tensor(config, held, shape, layout)
    if layout.context > 1:
        found += _context(held, shape, layout)
    if layout.expert > 1:
        found += _expert(config, held, shape, layout)
    if layout.pipeline > 1:
        found += _pipeline(config, held, shape, layout, pipeline)
    found += _replicas(held, shape, layout)
    found += _step(config, held, shape, layout)
    if shape.muon:
        found += [
            Sent(g.axis, "matrices for Muon", "all_gather", g.numbers * shape.weight, 1, g.ranks)
            for g in gathered_matrices(config, held, layout, tensor=tensor)
        ]
    return [sent for sent in found if sent.payload]


def by_op(sent: list[Sent]) -> dict[str, int]:
    """Payload by operation, as `Tracer.bytes()`."""
    found: dict[str, int] = {}
    for one in sent:
        found[one.op] = found.get(one.op, 0) + one.payload
    return found


def by_axis(sent: list[Sent]) -> dict[str, dict[str, float]]:
    """{axis: payload, wire, calls}."""
    found: dict[str, dict[str, float]] = {}
    for one in sent:
        row = found.setdefault(one.axis, {"payload": 0.0, "wire": 0.0, "calls": 0.0})
        row["payload"] += one.payload
        row["wire"] += one.wire
        row["calls"] += one.calls
    return found


def _tokens(shape: StepShape, layout: Layout) -> int:
    """Tokens of a row on one context rank; rows that do not divide are padded (`ContextParallel.cut`)."""
    if layout.context == 1:
        return shape.length
    unit = 2 * layout.context if layout.context_kind == "ring" else layout.context
    return -(-shape.length // unit) * unit // layout.context


# --- tensor and sequence ---

Make = Callable[..., Sent]


def _tensor(config: ModelConfig, held: Held, shape: StepShape, layout: Layout) -> Iterator[Sent]:
    m, n, t = shape.micro_batches, layout.tensor, _tokens(shape, layout)
    forwards = 2 if shape.recompute else 1
    tokens = shape.rows * t
    state = tokens * config.width * shape.activation
    padded = shape.rows * n * -(-t // n) * config.width * shape.activation  # what a gather or a scatter moves
    table = shape.weight * (padded // shape.activation if layout.sequence else tokens * config.width)

    def call(what: str, op: str, payload: int, times: int = 1) -> Sent:
        return Sent("tensor", what, op, payload * times * m, times * m, n)

    for number in held.layers:
        whole, local = config.layers[number], held.config.layers[number]
        feeds = 1 + _shared(local)
        leaving = (1 + feeds) * forwards - shape.recompute * _stops_early(whole)
        if layout.sequence:
            yield call("gathered into blocks", "all_gather", padded, 2 * forwards)
            yield call("scattered out of blocks", "reduce_scatter", padded, leaving)
            yield call("scattered, backward", "reduce_scatter", padded, 2)
            yield call("gathered, backward", "all_gather", padded, 1 + feeds)
            yield call("gradients of norms", "all_reduce", config.width * _norm(config) * shape.weight, _norms(whole))
            if isinstance(whole.feed_forward, ExpertsConfig) and whole.feed_forward.shared_gate:
                yield call("gradient of the shared gate", "all_reduce", config.width * shape.weight)
        else:
            latent = isinstance(local.attention, LatentAttentionConfig)
            yield call("sums of blocks", "all_reduce", state, leaving)
            yield call("sums of blocks, backward", "all_reduce", state, feeds + (not latent))
        yield from _beside(whole, local, shape, tokens, config.width, n, call, sequence=layout.sequence)
    if held.first:
        yield call("embedding", "reduce_scatter" if layout.sequence else "all_reduce", table)
        if layout.sequence:
            yield call("embedding, backward", "all_gather", table)
    if held.last:
        if layout.sequence:
            yield call("last hidden states", "all_gather", padded)
            yield call("gradient of the last norm", "all_reduce", config.width * _norm(config) * shape.weight)
        if config.head is not None:
            trained = shape.trained
            if trained is None:
                trained = m * shape.rows * (t - (layout.context == 1))
            yield Sent("tensor", "loss", "all_reduce", 3 * trained * shape.loss, 2 * m, n)
            yield call("hidden states, backward", "all_reduce", state)


def _beside(
    whole: LayerConfig, local: LayerConfig, shape: StepShape, tokens: int, width: int, n: int, call: Make, *,
    sequence: bool,
) -> Iterator[Sent]:  # fmt: skip
    """What some blocks have beside their sums."""
    a, mine, f = whole.attention, local.attention, whole.feed_forward
    if isinstance(a, AttentionConfig) and isinstance(mine, AttentionConfig):
        if a.qk_norm:
            yield call("gradients of head norms", "all_reduce", a.head_dim * shape.weight, 2)
        if a.kv_heads < n:  # several ranks hold one key head: a slot for each
            rows = a.head_dim * (width + a.qkv_bias)
            yield call("gradients of shared key heads", "all_reduce", a.kv_heads * rows * shape.weight, 2)
    elif isinstance(a, LatentAttentionConfig):
        into = a.q_rank if a.q_rank is not None else width
        if a.q_rank is not None or not sequence:
            yield call("queries' input, backward", "all_reduce", tokens * into * shape.activation)
        yield call("latent, backward", "all_reduce", tokens * (a.kv_rank + a.rope_dim) * shape.activation)
        yield call("gradient of the latent's norm", "all_reduce", a.kv_rank * shape.weight)
    if isinstance(f, ExpertsConfig):
        yield call("weights of routers, backward", "all_reduce", tokens * f.router.top_k * shape.loss)


def _shared(layer: LayerConfig) -> int:
    """Feed-forwards of a layer whose outputs are summed apart: one, and one more for a shared expert."""
    f = layer.feed_forward
    return 1 if isinstance(f, ExpertsConfig) and f.shared_hidden else 0


def _stops_early(layer: LayerConfig) -> bool:
    """Whether a recomputed layer leaves out its last sum: torch stops when all that backward needs is there, and of
    that sum nothing is, unless a norm or a shared expert's gate reads it."""
    f = layer.feed_forward
    return layer.norms == "pre" and not (isinstance(f, ExpertsConfig) and f.shared_hidden > 0 and f.shared_gate)


def _norms(layer: LayerConfig) -> int:
    return 4 if layer.norms == "sandwich" else 2


def _norm(config: ModelConfig) -> int:
    """Numbers of a norm for each of the width."""
    return 2 if config.norm.kind == "layer" and config.norm.bias else 1


# --- context ---


def _context(held: Held, shape: StepShape, layout: Layout) -> Iterator[Sent]:
    m, n, t = shape.micro_batches, layout.context, _tokens(shape, layout)
    forwards = 2 if shape.recompute else 1
    wide = max(4, shape.activation)
    for number in held.layers:
        a = held.config.layers[number].attention
        heads, key, value = a.kv_shape
        if layout.context_kind == "ring":
            block = (n - 1) * shape.rows * t * heads * (key + value)
            payload = block * shape.activation * forwards + block * (shape.activation + wide)
            yield Sent("context", "keys and values around the ring", "send", payload * m, 3 * (n - 1) * m, n)
        else:
            out = a.kv_rank if isinstance(a, LatentAttentionConfig) else value
            there = shape.rows * t * (a.heads * key + max(heads, n) * (key + value)) * shape.activation
            back = shape.rows * t * a.heads * out * shape.activation
            yield Sent("context", "tokens for heads, and back", "all_to_all", (there + back) * (forwards + 1) * m,
                       2 * (forwards + 1) * m, n)  # fmt: skip


# --- experts ---


def _expert(config: ModelConfig, held: Held, shape: StepShape, layout: Layout) -> Iterator[Sent]:
    """`parallel.expert`: each token's rows go to the ranks of its experts, and back."""
    m, n = shape.micro_batches, layout.expert
    forwards = 2 if shape.recompute else 1
    found = [config.layers[number].feed_forward for number in held.layers]
    experts = [f for f in found if isinstance(f, ExpertsConfig)]
    sent = m * shape.rows * _tokens(shape, layout) * sum(f.router.top_k for f in experts)
    arrived = sent if shape.arrived is None else shape.arrived
    calls = m * len(experts)
    size = config.width * shape.activation
    yield Sent("expert", "counts", "all_to_all", 8 * m * forwards * sum(f.count for f in experts), calls * forwards, n)
    yield Sent(
        "expert", "tokens to their experts", "all_to_all", sent * size * (forwards + 1), calls * (forwards + 1), n
    )
    yield Sent("expert", "and back", "all_to_all", arrived * size * (forwards + 1), calls * (forwards + 1), n)


# --- pipeline ---


def _pipeline(config: ModelConfig, held: Held, shape: StepShape, layout: Layout, place: int) -> Iterator[Sent]:
    m, n, t = shape.micro_batches, layout.pipeline, _tokens(shape, layout)
    tokens = -(-t // layout.tensor) if layout.sequence else t
    state = shape.rows * tokens * config.width * shape.activation
    count = sends(place, n, layout.schedule, layout.stages_a_rank) * m
    yield Sent("pipeline", "states and their gradients", "send", count * state, count, n)
    if config.tied_embeddings and config.head is not None and held.first != held.last:
        yield Sent("pipeline", "gradient of the tied embedding", "send", held.table * shape.weight, 1, n)
    yield Sent("pipeline", "loss", "all_reduce", shape.loss, 1, n)


# --- replicas ---


def _replicas(held: Held, shape: StepShape, layout: Layout) -> Iterator[Sent]:
    n = (layout.data or 1) * layout.context
    dense = {number: size[0] for number, size in held.layers.items()}
    experts = {number: size[1] for number, size in held.layers.items() if size[1]}
    rest, ahead = held.rest, held.ahead
    if layout.expert == 1:
        dense = {number: dense[number] + experts.get(number, 0) for number in dense}
        experts, rest, ahead = {}, rest + ahead, 0
    parts = (
        ("replicas", list(dense.values()), rest, n),
        ("expert replicas", list(experts.values()), ahead, n // layout.expert),
    )
    for axis, layers, end, ranks in parts:
        if ranks > 1 and (layers or end):
            yield from _zero(axis, layers, end, shape, layout, ranks)


def _zero(axis: str, layers: list[int], rest: int, shape: StepShape, layout: Layout, n: int) -> Iterator[Sent]:
    """`parallel.data` and `parallel.zero`: numbers of units -> what they send."""
    m, w = shape.micro_batches, shape.weight
    if layout.shard == "none":
        yield Sent(axis, "gradients", "all_reduce", (sum(layers) + rest) * w, len(layers) + (rest > 0), n)
        return
    cut = [-(-size // n) * n for size in layers]  # padded to equal shares
    end = -(-rest // n) * n
    units = len(cut) + (rest > 0)
    late = m == 1 or (layout.schedule == "zero_bubble" and layout.pipeline > 1)
    scatters = 1 if layout.shard == "zero1" or late else m
    yield Sent(axis, "gradients", "reduce_scatter", scatters * (sum(cut) + end) * w, scatters * units, n)
    if layout.shard == "zero3":
        yield Sent(axis, "weights", "all_gather", (2 * m * sum(cut) + end) * w, 2 * m * len(cut) + (rest > 0), n)
    else:
        yield Sent(axis, "weights", "all_gather", (sum(cut) + end) * w, units, n)


# --- numbers of a step ---


def _step(config: ModelConfig, held: Held, shape: StepShape, layout: Layout) -> Iterator[Sent]:
    replicas = (layout.data or 1) * layout.context
    world = layout.inner * (layout.data or 1)
    experts = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, ExpertsConfig)]
    if world == 1:
        return
    totals = 1 + config.predict_ahead + bool(experts) + 2
    yield Sent("step", "denominators, tokens, the wish to stop", "all_reduce", 8 * totals, 1, world)
    if replicas > 1:
        yield Sent("step", "loss", "all_reduce", shape.loss, 1, replicas)
    if layout.shard != "none" or layout.tensor > 1 or layout.pipeline > 1 or layout.expert > 1:
        yield Sent("step", "squared norm of the gradient", "all_reduce", 8, 1, world)
    if experts and replicas > 1:
        mine = [held.config.layers[n].feed_forward for n in held.layers]
        loads = sum(f.count for f in mine if isinstance(f, ExpertsConfig))
        yield Sent("step", "loads of the experts", "all_reduce", 8 * loads, 1, replicas)
