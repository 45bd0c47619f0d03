"""What each process of `test_pipeline` computes: a model cut into stages, beside the same model in one process."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hanlin.models.transformer import Output, Transformer
from hanlin.nn.balance import expert_load, router_z_loss
from hanlin.nn.routing import RouterConfig
from hanlin.parallel import pipeline as pipelining
from hanlin.parallel.pipeline import Pipeline
from hanlin.parallel.stages import sends
from hanlin.train.choices import Recompute
from hanlin.train.objective import CausalLM, document_mask, step_loss
from hanlin.train.recompute import recompute_layers

VOCABULARY, WIDTH, ROWS, LENGTH, DEPTH, STEPS, COUNT = 61, 32, 2, 12, 8, 5, 4
DENSE = LayerConfig(AttentionConfig(4, 2, 8, qk_norm=True), FeedForwardConfig(40))
EXPERTS = LayerConfig(AttentionConfig(4, 2, 8), ExpertsConfig(4, 16, RouterConfig(2), shared_hidden=8))
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layers": (DENSE,) * DEPTH},
    "tied": {"layers": (DENSE,) * DEPTH, "tied_embeddings": True},
    "experts": {"layers": (DENSE, *(EXPERTS,) * (DEPTH - 1))},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "naive": {"schedule": "naive"},
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved"},
    "zero_bubble": {"schedule": "zero_bubble"},
    "zero_bubble of 4": {"schedule": "zero_bubble", "chunks": 4},
}
CHANGED = ("1f1b", "zero_bubble", "zero_bubble of 4")  # with recompute, and with frozen layers
NUMBERS = (1, 2, 5)  # of micro-batches in zero_bubble
MUTATIONS = ("gradient divided by micro-batches", "a border's gradient dropped", "tied gradient not summed")


def model_of(kind: str) -> Transformer:
    """Every parameter random, the same in every process, fp64."""
    torch.manual_seed(3)
    model = Transformer(ModelConfig("qwen3", VOCABULARY, WIDTH, **MODELS[kind])).double()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    return model


def parts_of(step: int, count: int, length: int = LENGTH) -> list[Batch]:
    """Micro-batches of packed documents with padding; one in four has no trained token at all."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(100 * step + number)
        ids = torch.randint(0, VOCABULARY, (ROWS, length), generator=generator)
        documents = (torch.rand(ROWS, length, generator=generator) < 0.15).long().cumsum(1)
        documents[0, -3:] = -1
        if number % 4 == 3:
            documents = torch.arange(length).expand(ROWS, -1)
        made.append(Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents))
    return made


def run_inputs(part: Batch) -> dict[str, Any]:
    return {"positions": part.positions, "mask": document_mask(part)}


class Scoring:
    """The loss of a step and what its routers chose; `score` and `routing` of a pipeline, or both at once."""

    def __init__(self, parts: list[Batch]) -> None:
        self.objective, self.loads = CausalLM(), Counter()
        self.totals = {"tokens": sum(self.objective.count(part)["tokens"] for part in parts)}
        self.real = float(sum(part.tokens for part in parts))

    def score(self, model: Transformer, output: Output, part: Batch) -> Tensor:
        return step_loss(self.objective.score(model, output, part)[0], self.totals)

    def routing(self, notes: Any, part: Batch, first: int = 0) -> Tensor | None:
        keep = (part.documents >= 0).reshape(-1)
        for place, note in enumerate(notes, start=first):
            for expert, load in enumerate(expert_load(note, keep).tolist()):
                self.loads[f"{place}.{expert}"] += load
        return router_z_loss(notes, keep) * (0.1 / self.real)

    def whole(self, model: Transformer, part: Batch) -> Tensor:
        output = self.objective.run(model, part)
        loss = self.score(model, output, part)
        return loss + self.routing(output.routing, part) if output.routing else loss


def optimizer_of(model: Transformer) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)]  # a rank may have none
    return torch.optim.AdamW(trained, lr=1e-2, foreach=False)


@cache
def in_one_process(
    kind: str, count: int, change: Callable[[Transformer], Any]
) -> tuple[list[float], dict[str, Tensor], list[Counter]]:
    """Losses, weights and expert loads after `STEPS` steps."""
    model = model_of(kind)
    change(model)
    optimizer, losses, loads = optimizer_of(model), [], []
    for step in range(STEPS):
        parts = parts_of(step, count)
        scoring = Scoring(parts)
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = scoring.whole(model, part)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
        loads.append(scoring.loads)
    return losses, {name: p.detach() for name, p in model.named_parameters()}, loads


def in_a_pipeline(pipeline: Pipeline, count: int) -> tuple[list[float], list[Counter]]:
    """The same over the ranks."""
    optimizer, losses, loads = optimizer_of(pipeline.model), [], []
    for step in range(STEPS):
        parts = parts_of(step, count)
        scoring = Scoring(parts)
        optimizer.zero_grad()
        losses.append(float(pipeline.step(parts, run_inputs, scoring.score, routing=scoring.routing)))
        optimizer.step()
        loads.append(scoring.loads)
    return losses, loads


def as_it_is(model: Transformer) -> None:
    """No change."""


def gap(
    kind: str, count: int, change: Callable[[Transformer], Any] = as_it_is, **choice: Any
) -> tuple[float, float, bool]:
    """Largest difference of a loss (relative) and of a weight (relative L2) to one process; whether loads are equal."""
    losses, weights, loads = in_one_process(kind, count, change)
    cut = model_of(kind)
    pipeline = Pipeline(cut, **choice)
    change(cut)
    found, counted = in_a_pipeline(pipeline, count)
    worst = max(abs(a - b) / abs(a) for a, b in zip(losses, found, strict=True))
    held = dict(cut.named_parameters())
    assert held and held.keys() < weights.keys()
    far = max(float((p.detach() - weights[name]).norm() / weights[name].norm()) for name, p in held.items())
    return worst, far, loads_agree(pipeline, loads, counted)


def loads_agree(pipeline: Pipeline, loads: list[Counter], counted: list[Counter]) -> bool:
    """Whether this rank's routers chose as those of the same layers in one process."""
    layers = [number for stage in pipeline.stages for number in stage.layers]
    routed = [n for n in layers if isinstance(pipeline.model.config.layers[n].feed_forward, ExpertsConfig)]
    everywhere = [
        n for n, layer in enumerate(pipeline.model.config.layers) if isinstance(layer.feed_forward, ExpertsConfig)
    ]
    for whole, mine in zip(loads, counted, strict=True):
        wanted = {f"{i}.{e}": whole[f"{everywhere.index(n)}.{e}"] for i, n in enumerate(routed) for e in range(4)}
        if {key: mine[key] for key in wanted} != wanted or len(mine) > len(wanted):
            return False
    return True


class Sent(TorchDispatchMode):
    """Bytes that this process gave to others, by operation of `torch.distributed`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname != "recv_":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.bytes[func._opname] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def payload(kind: str, count: int, *, bf16: bool = False, **choice: Any) -> dict[str, Any]:
    """Bytes of the first and of the second step, beside the formula."""
    pipeline = Pipeline(model_of(kind).float() if bf16 else model_of(kind), **choice)
    if bf16:
        pipeline.model.compute_dtype = torch.bfloat16
    parts = parts_of(0, count)
    found = []
    for _ in range(2):
        scoring = Scoring(parts)
        pipeline.model.zero_grad()
        with Sent() as sent:
            pipeline.step(parts, run_inputs, scoring.score, routing=scoring.routing)
        found.append(dict(sent.bytes))
    state = ROWS * LENGTH * WIDTH * (2 if bf16 else 8)
    exchanges = kind == "tied" and pipeline.last_rank and pipeline.rank in (0, pipeline.last_rank)
    table = VOCABULARY * WIDTH * 8 if exchanges else 0
    mine = sends(pipeline.rank, pipeline.ranks, **choice) * count * state
    return {"found": found, "wanted": {"send": mine + table, "allreduce_": 4 if bf16 else 8}, "states": mine}


def held(kind: str, **choice: Any) -> dict[str, Any]:
    """What a rank keeps of a model, and whether the rest is given back."""
    model = model_of(kind)
    everything = list(dict(model.named_parameters()))
    whole = sum(p.numel() for p in model.parameters())
    pipeline = Pipeline(model, **choice)
    storage = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return {
        "everything": everything,
        "names": [name for name, _ in model.named_parameters()],
        "numbers": sum(p.numel() for p in model.parameters()),
        "whole": whole,
        "bytes": sum(storage.values()),
        "layers": [list(stage.layers) for stage in pipeline.stages],
        "elsewhere": sorted(pipeline.counted_elsewhere),
    }


def evaluated(kind: str, counts: tuple[int, ...], **choice: Any) -> float:
    """Difference of the loss without gradients; some micro-batches are shorter. Then a step must still be right."""
    whole = model_of(kind)
    pipeline = Pipeline(model_of(kind), **choice)
    worst = 0.0
    for count in counts:
        parts = parts_of(0, count) + parts_of(1, count, length=LENGTH - 5)
        scoring = Scoring(parts)
        with torch.no_grad():
            wanted = sum(float(scoring.score(whole, scoring.objective.run(whole, part), part)) for part in parts)
        found = float(pipeline.evaluate(parts, run_inputs, scoring.score))
        worst = max(worst, abs(found - wanted) / abs(wanted))
        assert all(p.grad is None for p in pipeline.model.parameters())
    return worst


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """A pipeline with one mistake."""
    owner, attribute = {
        MUTATIONS[0]: (Pipeline, "_training_order"),
        MUTATIONS[1]: (pipelining._Place, "get_bwd_send_ops"),
        MUTATIONS[2]: (Pipeline, "_sum_table"),
    }[name]
    right = getattr(owner, attribute)

    def divided(self: Any, *arguments: Any) -> Any:
        order = right(self, *arguments)
        order.scale_grads = True
        return order

    def dropped(self: Any, number: int) -> Any:
        for operation in (operations := right(self, number)):
            if number == 1:
                operation.tensor.zero_()
        return operations

    setattr(owner, attribute, dict(zip(MUTATIONS, (divided, dropped, lambda self: None), strict=True))[name])
    try:
        yield
    finally:
        setattr(owner, attribute, right)


def freeze_beginning(model: Transformer) -> None:
    """The embedding and the first three layers learn nothing."""
    for name, parameter in model.named_parameters():
        if "embed" in name or any(f"layers.{n}." in name for n in range(3)):
            parameter.requires_grad_(False)


def recompute(model: Transformer) -> None:
    recompute_layers(model, Recompute(kind="full"))


def refusal(parts: list[Batch], **choice: Any) -> str:
    """What a step says."""
    pipeline = Pipeline(model_of("dense"), **choice)
    scoring = Scoring(parts)
    try:
        pipeline.step(parts, run_inputs, scoring.score)
    except HanlinError as error:
        return str(error)
    return "nothing"


def twice() -> str:
    """What the second step of a tied model says, if the gradients of the first are still there."""
    pipeline, parts = Pipeline(model_of("tied"), schedule="gpipe"), parts_of(0, 2)
    pipeline.step(parts, run_inputs, Scoring(parts).score)
    try:
        pipeline.step(parts, run_inputs, Scoring(parts).score)
    except HanlinError as error:
        return str(error)
    return "nothing"


def raised_in_a_stage() -> str:
    """What comes out of a pipeline when the score refuses."""

    def score(*_: Any) -> Tensor:
        raise HanlinError("no such score")

    pipeline = Pipeline(model_of("dense"), schedule="gpipe")
    try:
        pipeline.evaluate(parts_of(0, 1), run_inputs, score)
    except HanlinError as error:
        dist.all_reduce(torch.zeros((), dtype=torch.float64))  # the others wait for the loss
        return str(error)
    return ""


def compare(rank: int, ranks: int, folder: str) -> None:
    """Writes what was found to `folder`/rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    found: dict[str, Any] = {}
    for name, choice in SCHEDULES.items():
        if ranks * choice.get("chunks", 1) > DEPTH:
            continue
        for kind in MODELS:
            found[f"{kind}: {name}"] = gap(kind, 8 if (kind, ranks) == ("dense", 4) else COUNT, **choice)
        if ranks == 2 and name in CHANGED:
            found[f"recomputed: {name}"] = gap("experts", COUNT, recompute, **choice)
            found[f"frozen: {name}"] = gap("tied", COUNT, freeze_beginning, **choice)
        found[f"payload: {name}"] = payload("tied", COUNT, **choice)
        found[f"payload of bf16: {name}"] = payload("experts", COUNT, bf16=True, **choice)
        found[f"held: {name}"] = held("tied", **choice)
        found[f"evaluated: {name}"] = evaluated("dense", (1, 3), **choice)
    for number in NUMBERS:
        found[f"{number} micro-batches"] = gap("dense", number, schedule="zero_bubble")
    if ranks == 4:  # two pipelines beside each other
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for name in ("1f1b", "interleaved"):
            found[f"a part of all processes: {name}"] = gap("tied", COUNT, schedule=name, group=halves[rank // 2])
    for name in MUTATIONS if ranks == 2 else ():
        with mutated(name):
            found[name] = gap("tied", COUNT, schedule="1f1b")
    found["refused"] = {
        "shapes": refusal([*parts_of(0, 3), *parts_of(1, 1, length=7)], schedule="gpipe"),
        "none": refusal([], schedule="gpipe"),
        "few": refusal(parts_of(0, 1), schedule="1f1b"),
        "rounds": refusal(parts_of(0, 2 * ranks + 1), schedule="interleaved"),
        "twice": twice(),
        "stage": raised_in_a_stage(),
    }
    Path(folder, str(rank)).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
