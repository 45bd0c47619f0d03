"""What one rank of a layout holds of a model, counted from the config alone: numbers, activations, products.

    stage      the layers that `parallel.stages` gives it; the embedding stands before the first, the last norm and the
               head behind the last
    tensor     matrices of attention and feed-forward are cut into T, norms, routers and latents are whole
    expert     the experts are cut into E, and each expert's matrices into T besides

Everything here is a closed form, quick enough for thousands of layouts; `plan.memory` runs the real modules instead.
"""

from collections import Counter
from dataclasses import dataclass, replace

from hanlin.models.accounting import count_flops, layer_products
from hanlin.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from hanlin.nn.rope import Rope
from hanlin.parallel.settings import Layout, Schedule
from hanlin.parallel.stages import rank_stages, stage_layers
from hanlin.plan.formulas import layer_activations_modern


@dataclass(frozen=True)
class LayerSize:
    """Numbers of one layer: cut by tensor parallelism, whole on every rank, in routed experts; matrices: of all that a
    Linear or an expert multiplies, the router aside; adapted: sum of in + out over what LoRA hangs on."""

    cut: int
    whole: int
    experts: int
    matrices: int
    adapted: int


@dataclass(frozen=True)
class Share:
    """What a rank holds. dense: numbers that every replica has (embedding and head among them); experts: numbers of its
    experts; kinds: {number of the kind of layer: how many}; flops: of one row through it, over all tensor and context
    ranks."""

    dense: float
    experts: float
    embedding: float
    head: float
    kinds: dict[int, int]
    last: bool

    @property
    def total(self) -> float:
        return self.dense + self.experts

    @property
    def layers(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class RowFlops:
    """Forward FLOPs of one row: of each kind of layer, of its scores alone, of the head, of the modules that predict
    ahead, and of all together."""

    kinds: list[float]
    scores: list[float]
    head: float
    ahead: float
    total: float


class Sizes:
    """A config, measured once: equal layers are one kind, and what was counted is kept."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        everything = (*config.layers, *config.encoder)
        self.kinds: list[LayerConfig] = list(dict.fromkeys(everything))
        number = {layer: i for i, layer in enumerate(self.kinds)}
        order = [number[layer] for layer in everything]
        self.decoder, self.encoder = order[: len(config.layers)], order[len(config.layers) :]
        self.layer = [_layer_size(config, layer) for layer in self.kinds]
        self.total = config.parameters().total
        self.matrices = sum(self.layer[i].matrices for i in order)
        self.adapted = sum(self.layer[i].adapted for i in order)
        self._shares: dict[tuple[int, int, int, int, int, Schedule], Share] = {}
        self._flops: dict[int, RowFlops] = {}
        self._stored: dict[int, list[float]] = {}
        self._results: dict[int, list[tuple[float, float]]] = {}

    def share(self, layout: Layout, place: int = 0) -> Share:
        """What the ranks of pipeline place `place` hold."""
        key = (layout.tensor, layout.expert, layout.pipeline, layout.stages_a_rank, place, layout.schedule)
        if key not in self._shares:
            self._shares[key] = self._share(*key)
        return self._shares[key]

    def flops(self, length: int) -> RowFlops:
        """Of a row of `length` tokens."""
        if length not in self._flops:
            self._flops[length] = self._count(length)
        return self._flops[length]

    def stored(self, itemsize: int) -> list[float]:
        """Bytes of activations that backward needs of each kind of layer, a token, as this code keeps them."""
        if itemsize not in self._stored:
            self._stored[itemsize] = [_stored(self.config, layer, itemsize) for layer in self.kinds]
        return self._stored[itemsize]

    def results(self, itemsize: int) -> list[tuple[float, float]]:
        """Bytes of what products and attention give in each kind of layer, a token: (what tensor ranks share, what each
        has whole). `train.recompute` keeps these under `operators`."""
        if itemsize not in self._results:
            self._results[itemsize] = [_results(self.config, layer, itemsize) for layer in self.kinds]
        return self._results[itemsize]

    def routing(self, kind: int) -> float:
        """Bytes that a router's choices take, a token: fp32 logits and scores, numbers and weights of the chosen."""
        f = self.kinds[kind].feed_forward
        return 8.0 * f.count + 12.0 * f.router.top_k if isinstance(f, ExpertsConfig) else 0.0

    def chosen(self, kind: int) -> int:
        """Routed experts that a token goes through."""
        return chosen(self.kinds[kind])

    def stage_flops(self, layout: Layout, place: int, length: int) -> float:
        """Forward FLOPs of one row through all stages of a pipeline place."""
        flops, share = self.flops(length), self.share(layout, place)
        return sum(flops.kinds[k] * n for k, n in share.kinds.items()) + (flops.head + flops.ahead) * share.last

    def busiest(self, layout: Layout, length: int) -> int:
        """The pipeline place with the most products."""
        return max(range(layout.pipeline), key=lambda place: self.stage_flops(layout, place, length))

    def _share(self, tensor: int, expert: int, pipeline: int, chunks: int, place: int, schedule: Schedule) -> Share:
        config, stages = self.config, stage_layers(self.config, pipeline * chunks)
        mine = rank_stages(place, pipeline, schedule, chunks) if pipeline > 1 else [0]
        kinds = Counter(self.decoder[number] for stage in mine for number in stages[stage])
        first, last = 0 in mine, len(stages) - 1 in mine
        if first:
            kinds.update(self.encoder)
        dense = sum(n * (self.layer[k].cut / tensor + self.layer[k].whole) for k, n in kinds.items())
        experts = sum(n * self.layer[k].experts / (tensor * expert) for k, n in kinds.items())
        dense += config.width if last and config.norm.final else 0
        table = config.vocab_size * config.width / tensor
        embedding = table if first else 0.0
        head = table if last and config.head is not None and (pipeline > 1 or not config.tied_embeddings) else 0.0
        if config.predict_ahead and last:
            size = self.layer[self.decoder[-1]]
            dense += config.predict_ahead * (size.cut / tensor + size.whole + 2 * config.width**2 + 3 * config.width)
            experts += config.predict_ahead * size.experts / (tensor * expert)
            embedding = table  # the modules that predict ahead look tokens up, too
        return Share(dense + embedding + head, experts, embedding, head, dict(kinds), last)

    def _count(self, length: int) -> RowFlops:
        config = self.config
        kinds, scores = [], []
        for layer in self.kinds:
            bare = replace(config, layers=(layer,), encoder=(), head=None, predict_ahead=0)
            kinds.append(count_flops(bare, 1, length).forward)
            scores.append(_score_flops(layer, length))
        whole = count_flops(config, 1, length)
        head = whole.parts.get("head", 0.0)
        step = kinds[self.decoder[-1]] + 2.0 * length * 2 * config.width**2 + head
        ahead = config.predict_ahead * step
        return RowFlops(kinds, scores, head, ahead, whole.forward + ahead)


def chosen(layer: LayerConfig) -> int:
    """Routed experts that a token goes through; 0 where the feed-forward is dense."""
    return layer.feed_forward.router.top_k if isinstance(layer.feed_forward, ExpertsConfig) else 0


def _layer_size(config: ModelConfig, layer: LayerConfig) -> LayerSize:
    cut = whole = experts = matrices = adapted = 0
    a = layer.attention
    latents = (a.q_rank, a.kv_rank + a.rope_dim) if isinstance(a, LatentAttentionConfig) else ()
    routed = 2 if isinstance(layer.feed_forward, ExpertsConfig) else 0  # up and down; what follows is shared
    for p in layer_products(config, layer):
        size = p.copies * (p.into * p.out + p.vectors)
        matrices += p.copies * p.into * p.out * (p.part != "router")
        if p.part == "experts" and routed:
            experts, routed = experts + size, routed - 1
            continue
        adapted += p.copies * (p.into + p.out) * (p.part != "router")
        if p.part == "router" or (p.part == "attention" and p.out in latents and p.into == config.width):
            whole += size
        else:
            cut += size
    norm = config.width * (2 if config.norm.kind == "layer" and config.norm.bias else 1)
    whole += norm * ((4 if layer.norms == "sandwich" else 2) + (layer.cross_attention is not None))
    if isinstance(a, AttentionConfig):
        whole += 2 * a.head_dim * a.qk_norm + a.heads * a.sinks
    elif isinstance(a, LatentAttentionConfig):
        whole += a.kv_rank + (a.q_rank or 0)
    return LayerSize(cut, whole, experts, matrices, adapted)


def _stored(config: ModelConfig, layer: LayerConfig, itemsize: int) -> float:
    """`layer_activations_modern`, and what is otherwise here: queries and keys stay before their rotation, too (one
    product makes q, k and v), attention's output before heads are joined; experts make sorted rows and activations
    again, and keep what the router said."""
    a, f, more = layer.attention, layer.feed_forward, 0.0
    if isinstance(a, AttentionConfig):
        turned = isinstance(a.position, Rope) and not a.qk_norm
        more += a.heads * a.head_dim + turned * (a.heads + a.kv_heads) * a.head_dim
    elif isinstance(a, LatentAttentionConfig):
        more += a.heads * (a.nope_dim + a.value_dim) + (a.q_rank or 0)
    apart = 0.0
    if isinstance(f, ExpertsConfig):
        more -= f.router.top_k * (config.width + f.hidden)
        wide = 4.0 * config.width if f.router.wide and itemsize == 2 else 0.0  # what the router reads, in fp32
        apart = 8.0 * f.count + 12.0 * f.router.top_k + wide
    return layer_activations_modern(config, layer, 1, 1, itemsize=itemsize) + itemsize * more + apart


def _results(config: ModelConfig, layer: LayerConfig, itemsize: int) -> tuple[float, float]:
    a = layer.attention
    _, _, value = a.kv_shape
    cut, whole = itemsize * a.heads * value + 4.0 * a.heads, 0.0
    for p in layer_products(config, layer):
        if p.out == config.width or p.part == "router":
            whole += itemsize * p.active * p.out
        else:
            cut += itemsize * p.active * p.out
    return cut, whole


def _score_flops(layer: LayerConfig, length: int) -> float:
    """Of the scores and of what they weigh: what selective recompute makes again and a ring hides behind."""
    a = layer.attention
    latent = isinstance(a, LatentAttentionConfig)
    widths = a.nope_dim + a.rope_dim + a.value_dim if latent else 2 * a.head_dim
    seen = min(length, a.window or length)
    return 2.0 * a.heads * widths * (seen * (seen + 1) / 2 + (length - seen) * seen)
