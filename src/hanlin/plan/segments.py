"""A short model's step on fake tensors, cut at its layers: what each kind of layer takes, keeps and gives back.

    embed | forward 0 | forward 1 | … | head ‖ head back | … | back 1 | back 0 | embed back     one micro-batch

Layers with equal `LayerConfig` are alike (every n-th of them, where only every n-th is recomputed), so a model of any
depth is put together from three rounds of its kinds: the first round also makes what layers share (rotary tables,
masks), the last one stands before the head, the middle one is every other layer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hanlin.models.config import LayerConfig, ModelConfig
from hanlin.nn.experts import Experts
from hanlin.plan.fake import Fakes, warm_tables
from hanlin.plan.ledger import Interval, Ledger
from hanlin.plan.work import Bench, Work, open_bench
from hanlin.train.muon import Muon

ROUNDS = 3


@dataclass(frozen=True)
class Sizes:
    """Bytes that stay through the whole step. state: of the optimiser; matrices: shapes of what Muon moves."""

    weights: int
    gradients: int
    state: int
    matrices: tuple[tuple[int, ...], ...] = ()

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(
            self.weights + other.weights, self.gradients + other.gradients, self.state + other.state,
            self.matrices + other.matrices,
        )  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """steps[m][name]: the intervals of micro-batch m (0: gradients arrive, 1: they are added to); optimiser: the last
    one. layers: what the short model has. sizes: of each layer without its experts, of its "experts 0", and of "embed"
    and "head" (0 where it is the embedding)."""

    steps: tuple[dict[str, Interval], ...]
    optimiser: Interval
    layers: tuple[LayerConfig, ...]
    sizes: dict[str, Sizes]
    period: int

    def place(self, index: int, layers: Sequence[LayerConfig]) -> str:
        """Which layer of the short model stands for layer `index` of a model with these layers."""
        kinds, phase = len(self.layers) // ROUNDS, index % self.period
        kind = self.layers[:kinds].index(layers[index]) + phase
        first = layers[index] not in layers[phase : index : self.period]
        turn = 0 if first else ROUNDS - 1 if index == len(layers) - 1 else 1
        return str(turn * kinds + kind)


def cut_step(config: ModelConfig, work: Work, *, device: str = "cpu", expert_ranks: int = 1) -> Segments:
    """Run the second step of the short model: then the optimiser's state is there."""
    period = (work.recompute.every or 2) if work.recompute.kind == "layers" else 1
    kinds = tuple(kind for kind in dict.fromkeys(config.layers) for _ in range(period))
    intervals, sizes = _run_short(config, work, kinds * ROUNDS, device, expert_ranks)
    steps: list[dict[str, Interval]] = []
    for interval in intervals[:-1]:
        if interval.name == "between":
            steps.append({})
        else:
            steps[-1][interval.name] = interval
    return Segments(tuple(steps), intervals[-1], kinds * ROUNDS, sizes, period)


def _run_short(
    config: ModelConfig, work: Work, layers: tuple[LayerConfig, ...], device: str, expert_ranks: int
) -> tuple[list[Interval], dict[str, Sizes]]:
    short, part = replace(config, layers=layers), replace(work, micro_batches=min(work.micro_batches, 2))
    with Planned(short, part, device, expert_ranks) as (fakes, bench):
        bench.step(fakes.stage)
        own_state(fakes.ledger, bench)
        sizes = _sizes(bench)
        fakes.ledger.restart()
        _cut_at_layers(bench, fakes.ledger)
        bench.step(_cutting(fakes))
    return fakes.ledger.intervals, sizes


class Planned:
    """Within it a bench on fake tensors, its ledger told of weights and gradients: -> (fakes, bench)."""

    def __init__(
        self, config: ModelConfig, work: Work, device: str, expert_ranks: int = 1,
        listener: Callable[..., None] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.work, self.expert_ranks = config, work, expert_ranks
        self.fakes = Fakes(device, listener)

    def __enter__(self) -> tuple[Fakes, Bench]:
        warm_tables(self.config)
        self.fakes.__enter__()
        bench = open_bench(self.config, self.work, torch.device("cpu"), part=partial(_own_experts, self.expert_ranks))
        ledger = self.fakes.ledger
        ledger.own(bench.model.parameters(), "weights")
        ledger.follow_gradients(p for p in bench.model.parameters() if p.requires_grad)
        ledger.restart()
        return self.fakes, bench

    def __exit__(self, *error: Any) -> None:
        self.fakes.__exit__(*error)


def own_state(ledger: Ledger, bench: Bench) -> None:
    """What the optimiser keeps is its own."""
    ledger.own(bench.optimizer.state().values(), "optimiser")


def _own_experts(ranks: int, model: nn.Module) -> None:
    """Each rank holds its share of every layer's experts; the router knows all of them."""
    if ranks == 1:
        return
    for module in model.modules():
        if isinstance(module, Experts):
            module.count //= ranks
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(module.count, *parameter.shape[1:])))


def _sizes(bench: Bench) -> dict[str, Sizes]:
    model, found = bench.model, {}
    seen: set[int] = set()

    def measure(parameters: Any) -> Sizes:
        weights = gradients = state = 0
        matrices: list[tuple[int, ...]] = []
        for p in parameters:
            if id(p) in seen:
                continue
            seen.add(id(p))
            weights += p.numel() * p.element_size()
            gradients += p.numel() * p.element_size() if p.requires_grad else 0
            for part in bench.optimizer.parts:
                state += sum(t.numel() * t.element_size() for t in part.state.get(p, {}).values())
                if isinstance(part, Muon) and p in part.state:
                    matrices.append(tuple(p.shape))
        return Sizes(weights, gradients, state, tuple(matrices))

    for index, layer in enumerate(model.model.layers):
        experts = [module for module in layer.modules() if isinstance(module, Experts)]
        found[f"experts {index}"] = measure(p for module in experts for p in module.parameters())
        found[str(index)] = measure(layer.parameters())
    found["embed"] = measure(model.model.embed_tokens.parameters())
    found["head"] = measure(model.parameters())
    return found


def _cut_at_layers(bench: Bench, ledger: Ledger) -> None:
    """Hooks where a layer begins and ends, forward and backward."""

    def before(index: int, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if index == 0:
            ledger.cut("embed")
            if arguments[0].requires_grad:
                arguments[0].register_hook(partial(arrived, "back 0"))

    def after(index: int, layer: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
        ledger.cut(f"forward {index}")
        last = index == len(layers) - 1
        out.register_hook(partial(arrived, "head back" if last else f"back {index + 1}"))

    def arrived(name: str, gradient: Tensor) -> None:
        ledger.cut(name)

    layers = list(bench.model.model.layers)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(before, index))
        layer.register_forward_hook(partial(after, index))


def _cutting(fakes: Fakes) -> Callable[[str], Any]:
    """The stages of `Bench.step`, with the cuts that are no layer's."""
    from contextlib import contextmanager

    @contextmanager
    def stage(name: str) -> Any:
        ledger = fakes.ledger
        if name == "forward":
            ledger.cut("between")
        with fakes.stage(name):
            yield
        if name == "loss":
            ledger.cut("head")
        elif name == "backward":
            done = any(interval.name == "back 0" for interval in _since_embed(ledger))
            ledger.cut("embed back" if done else "back 0")
        elif name == "optimiser":
            ledger.cut("optimiser")

    return stage


def _since_embed(ledger: Ledger) -> list[Interval]:
    names = [interval.name for interval in ledger.intervals]
    return ledger.intervals[len(names) - 1 - names[::-1].index("between") :]


def add(held: Counter[str], change: Counter[str]) -> None:
    """In place, negative numbers kept."""
    for name, size in change.items():
        held[name] += size
