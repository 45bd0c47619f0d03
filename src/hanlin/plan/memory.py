"""How many bytes one optimizer step holds at its fullest moment, by category, on any rank of any layout.

    weights         parameters, as they are stored
    gradients       `.grad`
    optimiser       its state
    activations     what backward needs, and casts of weights
    loss            logits, their slope, and what the head makes of them
    buffers         what lives for one operation or one layer; batches, tables
    communication   what is sent, received or gathered
    cache           keys and values (inference)

One process: the model's own code is run on fake tensors (`plan.fake`) and every byte is followed. Where that would be
long, or where ranks share the work, the step is put together from the intervals of a short model (`plan.segments`):
a rank holds its layers, its heads and hidden units, its experts, its tokens, and as many micro-batches as its schedule
keeps in flight. Both ways agree where both can be gone (tests/plan/test_memory.py).
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ExpertsConfig, LayerConfig, ModelConfig
from hanlin.parallel.settings import Layout
from hanlin.parallel.stages import rank_stages, stage_layers
from hanlin.parallel.tensor import local_config
from hanlin.plan.ledger import CATEGORIES, Interval
from hanlin.plan.muon_bytes import muon_high
from hanlin.plan.segments import Planned, Segments, Sizes, add, cut_step, own_state
from hanlin.plan.shares import chosen
from hanlin.plan.work import Work
from hanlin.train.choices import Muon
from hanlin.train.precision import Precision

SHORT = 8  # layers up to which the whole model is run
BUCKET = 1 << 24  # gradient numbers of one collective (`train.ranks`)
CUBLAS = 32 << 20  # bytes that a Hopper GPU's matrix library keeps (8 MiB before Hopper)
Way = Literal["whole", "layers"]


@dataclass(frozen=True)
class Memory:
    """parts: bytes of each category at the fullest moment; moment: where that is; way: how it was found ("whole": every
    operation followed, "layers": put together); phases: the peak of each part of the step."""

    parts: dict[str, int]
    moment: str
    way: Way
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def step_memory(
    config: ModelConfig,
    work: Work,
    layout: Layout | None = None,
    *,
    stage: int = 0,
    device: str = "cpu",
    way: Way | None = None,
    segments: Segments | None = None,
) -> Memory:
    """The peak of an optimizer step on a rank of pipeline stage `stage`. `work` counts that replica's rows and whole
    rows' tokens: context and sequence parallelism divide them here.

    device: "cpu" follows Hanlin's CPU kernels, "cuda" what a GPU would run. way None: "whole" where nothing is shared
    and the model is short. segments: of `step_segments`, where they are there already.
    """
    layout = layout or Layout(data=1)
    shared = layout.inner * layout.expert > 1 or layout.shard != "none"
    if not 0 <= stage < layout.pipeline:
        raise HanlinError(f"Stage {stage} does not exist: the pipeline has {layout.pipeline}.")
    if way == "whole" and shared:
        raise HanlinError('A whole run knows one process; with a layout `way` is "layers".')
    if way == "whole" or (way is None and not shared and len(config.layers) <= SHORT):
        return _whole(config, work, device)
    return _by_layers(config, work, layout, stage, device, segments)


def step_segments(config: ModelConfig, work: Work, layout: Layout, device: str) -> Segments:
    """The intervals that `step_memory` puts together, for several stages of one layout."""
    work = replace(work, length=_share(work.length, layout.context, "tokens of a row", "context"))
    return cut_step(_local(config, layout), work, device=device, expert_ranks=layout.expert)


def _whole(config: ModelConfig, work: Work, device: str) -> Memory:
    with Planned(config, work, device) as (fakes, bench):
        phases: dict[str, int] = {}
        for _ in range(2):  # the optimiser makes its state in the first
            bench.step(fakes.stage)
            own_state(fakes.ledger, bench)
    ledger = fakes.ledger
    phases = dict(ledger.phase_peaks)
    return _finished(ledger.peak_by, ledger.peak_stage, "whole", phases, device)


def _by_layers(
    config: ModelConfig, work: Work, layout: Layout, stage: int, device: str, segments: Segments | None
) -> Memory:
    if segments is None:
        segments = step_segments(config, work, layout, device)
    local = _local(config, layout)
    work = replace(work, length=work.length // layout.context)
    return _Rank(local, work, layout, stage, segments, device).memory()


def _local(config: ModelConfig, layout: Layout) -> ModelConfig:
    """What one rank of a tensor group computes."""
    for layer in config.layers:
        if isinstance(layer.feed_forward, ExpertsConfig):
            _share(layer.feed_forward.count, layout.expert, "experts", "expert")
    if layout.tensor == 1:
        return config
    vocabulary = -(-config.vocab_size // layout.tensor)
    return replace(local_config(config, layout.tensor), vocab_size=vocabulary)


def _share(count: int, ranks: int, what: str, axis: str) -> int:
    if count % ranks:
        raise HanlinError(f"{count} {what} cannot be shared equally by the {ranks} ranks of the axis `{axis}`.")
    return count // ranks


class _Rank:
    """The step of one rank, interval by interval."""

    def __init__(
        self, config: ModelConfig, work: Work, layout: Layout, stage: int, segments: Segments, device: str
    ) -> None:
        self.config, self.work, self.layout, self.segments, self.device = config, work, layout, segments, device
        stages = stage_layers(config, layout.pipeline * layout.stages_a_rank)
        mine = rank_stages(stage, layout.pipeline, layout.schedule, layout.stages_a_rank) if len(stages) > 1 else [0]
        self.chunks = [stages[number] for number in mine]
        self.first, self.last = 0 in mine, len(stages) - 1 in mine
        self.stage = stage
        self.replicas = (layout.data or 1) * layout.context
        self.held: Counter[str] = Counter()
        self.kept: deque[Counter[str]] = deque()  # what each micro-batch in flight has added, but for gradients
        self.peak, self.peak_by, self.moment = -1, Counter(), ""
        self.phases: dict[str, int] = {}

    def memory(self) -> Memory:
        common, experts = self._common(), self._experts(self._all())
        sizes, zero = common + experts, self.layout.shard
        self.held["weights"] = self._divided(common.weights, experts.weights) if zero == "zero3" else sizes.weights
        self.held["optimiser"] = sizes.state if zero == "none" else self._divided(common.state, experts.state)
        self.held["communication"] = self._communication(sizes)
        self._look("build", 0, Counter())
        backwards = 0
        for action in self._schedule():
            if action == "forward":
                self._forward(1 if backwards else 0)
            else:
                self._backward(min(backwards, 1))
                backwards += 1
        self._optimiser(sizes)
        return _finished(self.peak_by, self.moment, "layers", self.phases, self.device)

    def _divided(self, common: int, experts: int) -> int:
        """Shares of ZeRO: an expert is on fewer ranks, so each of them keeps more of it."""
        return common // self.replicas + experts // (self.replicas // self.layout.expert)

    def _experts(self, layers: Iterable[int]) -> Sizes:
        return sum((self.segments.sizes[f"experts {self._place(index)}"] for index in layers), Sizes(0, 0, 0))

    def _common(self) -> Sizes:
        total = Sizes(0, 0, 0)
        for index in self._all():
            total = total + self.segments.sizes[self._place(index)]
        return total + self._outside()

    def _outside(self) -> Sizes:
        """Of what is no layer's."""
        total = Sizes(0, 0, 0)
        if self.first:
            total = total + self.segments.sizes["embed"]
        if self.last:
            total = total + self.segments.sizes["head"]
            if self.config.tied_embeddings and not self.first:
                total = total + self.segments.sizes["embed"]
        return total

    def _all(self) -> list[int]:
        return [index for chunk in self.chunks for index in chunk]

    def _place(self, index: int) -> str:
        return self.segments.place(index, self.config.layers)

    def _schedule(self) -> list[str]:
        """Forward and backward passes of whole micro-batches on this rank. Once gradients are there and as many are in
        flight as ever, one is like the other: those that would follow are left out."""
        batches, layout = self.work.micro_batches, self.layout
        ahead = {"naive": 1, "gpipe": batches, "1f1b": layout.pipeline - self.stage}.get(
            layout.schedule, layout.pipeline
        )
        ahead = min(batches, 1 if layout.pipeline == 1 else ahead)
        passes = ["forward"] * ahead
        for _ in range(min(batches - ahead, 2)):
            passes += ["backward", "forward"]
        return passes + ["backward"] * ahead

    def _forward(self, batch: int) -> None:
        intervals, before = self._intervals(batch), Counter(self.held)
        if self.first:
            self._go(intervals["embed"], "forward")
        for index in self._all():
            self._go(intervals[f"forward {self._place(index)}"], "forward")
            self.held["activations"] += self._laid(index)
        self.kept.append(self._since(before))

    def _backward(self, batch: int) -> None:
        """Whatever the micro-batch added is gone in the end. The intervals alone need not come out even: the short
        model gives back in its first layer what all of its few layers kept for each other (the routers' choices), and
        a stage's last output and its gradient change hands in the head, which other stages have not."""
        intervals, before = self._intervals(batch), Counter(self.held)
        if self.last:
            self._go(intervals["head"], "loss")
            self._go(intervals["head back"], "backward")
        for index in reversed(self._all()):
            self._go(intervals[f"back {self._place(index)}"], "backward", index)
            self.held["activations"] -= self._laid(index)
        if self.first and "embed back" in intervals:
            self._go(intervals["embed back"], "backward")
        for more in (self.kept.popleft(), self._since(before)):
            self.held.subtract(more)

    def _since(self, before: Counter[str]) -> Counter[str]:
        """What has come since then and belongs to a micro-batch: gradients stay."""
        more = Counter(self.held)
        more.subtract(before)
        del more["gradients"]
        return more

    def _laid(self, index: int) -> int:
        """Activations that a layer keeps more than the short model's, whose tokens do not travel: what each norm reads
        is a share of the row (sequence parallelism), rows for experts are kept as they arrive and as they come back.
        Recompute of `operators` keeps what a GPU's attention gives, too, which `plan.fused_attention` is not."""
        again = self.work.recompute.kind in ("full", "operators")
        state = self.work.rows * self.work.length * self.config.width * self.work.itemsize
        more = 0 if again or self.layout.expert == 1 else chosen(self.config.layers[index]) * state
        if self.layout.sequence:
            more -= (1 if again else 2) * (state - state // self.layout.tensor)
        if self.work.recompute.kind == "operators" and self.device == "cuda":
            a = self.config.layers[index].attention
            more += self.work.rows * self.work.length * a.heads * (a.kv_shape[2] * self.work.itemsize + 4)
        return more

    def _intervals(self, batch: int) -> dict[str, Interval]:
        return self.segments.steps[min(batch, len(self.segments.steps) - 1)]

    def _optimiser(self, sizes: Sizes) -> None:
        interval, choice = self.segments.optimiser, self.work.optimizer
        high, spike = interval.high, Counter(interval.spike)
        if isinstance(choice, Muon):
            ranks = 1 if self.layout.shard == "none" else self.replicas
            dtype = Precision(self.work.precision).products
            high = muon_high(sizes.matrices, choice, dtype, device=self.device, ranks=ranks)
            spike = Counter(buffers=high)
        self._look("optimiser", high, spike)

    def _go(self, interval: Interval, phase: str, layer: int | None = None) -> None:
        self._look(phase, interval.high, interval.spike)
        change = Counter(interval.change)
        if self.layout.shard in ("zero2", "zero3") and change["gradients"]:
            experts = 0 if layer is None else min(change["gradients"], self._experts([layer]).gradients)
            change["gradients"] = self._divided(change["gradients"] - experts, experts)
        add(self.held, change)

    def _look(self, phase: str, high: int, spike: Counter[str]) -> None:
        now = sum(self.held.values()) + high
        self.phases[phase] = max(self.phases.get(phase, 0), now)
        if now > self.peak:
            self.peak, self.moment = now, phase
            self.peak_by = Counter(self.held)
            add(self.peak_by, spike)

    def _communication(self, sizes: Sizes) -> int:
        """Buffers of collectives and messages, at most."""
        layout, item = self.layout, self.work.itemsize
        tokens = self.work.rows * self.work.length
        total = 0
        if layout.pipeline > 1:  # one hidden state in, one gradient out
            total += 2 * tokens * self.config.width * item
        if layout.context > 1 and layout.context_kind == "ring":  # the next keys and values, while these are used
            total += 2 * max(tokens * _kv_numbers(layer) * item for layer in self.config.layers)
        if layout.expert > 1:  # tokens out and back
            total += 2 * max(tokens * chosen(layer) * self.config.width * item for layer in self.config.layers)
        biggest = max(
            (self.segments.sizes[self._place(index)] + self._experts([index])).weights for index in self._all()
        )
        if layout.shard == "zero3":  # this layer and the next, and what is outside of layers through the whole step
            total += 2 * biggest + self._outside().weights
        if self.replicas > 1 and sizes.gradients:
            total += 2 * min(BUCKET * 4, sizes.gradients)
        return total


def _kv_numbers(layer: LayerConfig) -> int:
    a = layer.attention
    if isinstance(a, AttentionConfig):
        return 2 * a.kv_heads * a.head_dim
    heads, key, value = a.kv_shape
    return heads * (key + value)


def _finished(parts: Counter[str], moment: str, way: Way, phases: dict[str, int], device: str) -> Memory:
    found = {category: int(parts.get(category, 0)) for category in CATEGORIES}
    if device == "cuda":
        found["buffers"] += CUBLAS
    return Memory(found, moment, way, phases)
