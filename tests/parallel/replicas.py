"""A few steps of training over replicas, in fp64, and the same steps in one process."""

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.train.tiny_training import TinySource, tiny_model

from hanlin.models.config import AttentionConfig, ExpertsConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import RouterConfig
from hanlin.parallel.data import DataParallel
from hanlin.parallel.replication import Replication
from hanlin.parallel.zero import Zero
from hanlin.train.choices import Recompute
from hanlin.train.objective import CausalLM
from hanlin.train.recompute import recompute_layers
from hanlin.tune.lora import add_lora

ROWS, STEPS, MICRO = 8, 6, 2
KINDS = ("untied", "tied", "moe", "lora", "frozen start", "recomputed")
Ways = tuple[str, ...]  # of: data, zero1, zero2, zero3
Check = Callable[[Ways], Any]  # returns something that JSON can hold


def model_of(kind: str) -> Transformer:
    """A tiny model in fp64, equal in every process."""
    if kind != "moe":
        model = tiny_model(tied=kind in ("tied", "frozen start")).double()
    else:
        torch.manual_seed(1)
        attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8, qkv_bias=True)
        experts = ExpertsConfig(4, 16, RouterConfig(2), shared_hidden=8)
        model = Transformer(
            ModelConfig.uniform(
                "qwen2_moe", depth=3, attention=attention, feed_forward=experts, vocab_size=61, width=32,
                tied_embeddings=False,
            )
        ).double()  # fmt: skip
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    if kind == "lora":
        adapter = add_lora(model, rank=3, seed=1)
        for branch in adapter.branches.values():
            branch.b.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    if kind == "frozen start":
        for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()]:
            parameter.requires_grad_(False)
    if kind == "recomputed":
        recompute_layers(model, Recompute(kind="full"))
    return model


def loss_of(model: Transformer, step: int, start: int, stop: int) -> torch.Tensor:
    """Of some rows, over the tokens of the whole step."""
    objective, source = CausalLM(), TinySource(ROWS)
    terms, _ = objective.loss(model, source.batch(step, start, stop))
    return terms[0][0] / objective.count(source.batch(step))["tokens"]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-2, weight_decay=0.1)


def train_alone(kind: str) -> dict[str, torch.Tensor]:
    """Weights after `STEPS` steps of one process, one backward each."""
    model = model_of(kind)
    optimizer = adam(p for p in model.parameters() if p.requires_grad)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, 0, ROWS).backward()
        optimizer.step()
    return dict(model.named_parameters())


def replicate(model: Transformer, way: str, group: Any) -> Replication:
    named = dict(model.named_parameters())
    return DataParallel(named, group) if way == "data" else Zero(model, named, group, int(way[-1]))


def run_step(
    model: Transformer, replications: list[Replication], step: int, micro: int = MICRO, *, last: bool = True
) -> None:
    """The gradient of one step, this rank's rows in `micro` micro-batches."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = ROWS // ranks // micro
    for replication in replications:
        replication.begin()
    for part in range(micro):
        start = rank * ROWS // ranks + part * rows
        with last_of(replications) if last and part == micro - 1 else nullcontext():
            loss_of(model, step, start, start + rows).backward()
    for replication in replications:
        replication.finish()


@contextmanager
def last_of(replications: list[Replication]) -> Generator[None]:
    with ExitStack() as stack:
        for replication in replications:
            stack.enter_context(replication.last())
        yield


def steps_of(model: Transformer, replications: list[Replication], *, last: bool = True) -> None:
    optimizer = adam(piece for r in replications for piece in r.pieces.values())
    for step in range(STEPS):
        run_step(model, replications, step, last=last)
        optimizer.step()
        for replication in replications:
            replication.publish()


def gap(model: Transformer, wanted: dict[str, torch.Tensor], *replications: Replication) -> float:
    """Largest relative L2 distance of a parameter from what it should be."""
    assert wanted.keys() == dict(model.named_parameters()).keys()
    worst = 0.0
    with ExitStack() as stack, torch.no_grad():
        for replication in replications:
            stack.enter_context(replication.whole())
        for name, parameter in model.named_parameters():
            worst = max(worst, float((parameter - wanted[name]).norm() / wanted[name].norm()))
    return worst


def train_together(kind: str, way: str, *, last: bool = True) -> float:
    model = model_of(kind)
    replication = replicate(model, way, dist.group.WORLD)
    steps_of(model, [replication], last=last)
    return gap(model, train_alone(kind), replication)


def gradient_gap(replication: Replication, whole: Transformer) -> float:
    """Largest relative distance of a piece's gradient from its range of the whole model's."""
    named, worst = dict(whole.named_parameters()), 0.0
    for name, piece in replication.pieces.items():
        start, stop = replication.ranges[name]
        grad = named[name].grad
        wanted = torch.zeros_like(named[name]) if grad is None else grad
        wanted = wanted.flatten()[start:stop]
        assert piece.grad is not None
        worst = max(worst, float((piece.grad.flatten() - wanted).norm() / wanted.norm().clamp_min(1e-6)))
    return worst


def formula(model: Transformer, way: str, micro: int) -> dict[str, int]:
    """As `parallel.zero` and `parallel.data` write it, counted here from the parameters' shapes alone."""
    ranks = dist.get_world_size()
    units = [list(layer.parameters()) for layer in model.model.layers]
    inside = {id(p) for unit in units for p in unit}
    rest = [p for p in model.parameters() if id(p) not in inside]

    def padded(parameters: Any, trainable: bool) -> int:
        count = sum(p.numel() for p in parameters if p.requires_grad is trainable)
        return -(-count // ranks) * ranks

    P, F = [padded(unit, True) for unit in units], [padded(unit, False) for unit in units]
    if way == "data":
        return {"all_reduce": 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)}
    trained = sum(P) + padded(rest, True)
    if way != "zero3":
        return {"reduce_scatter": 8 * trained * (1 if way == "zero1" else micro), "all_gather": 8 * trained}
    gathers = padded(rest, True) + padded(rest, False)
    first = next((i for i, p in enumerate(P) if p), len(P)) if not padded(rest, True) or not embeds(model) else 0
    for number, (p, f) in enumerate(zip(P, F, strict=True)):
        gathers += micro * (p + f) * (2 if number >= first else 1)
    return {"reduce_scatter": 8 * micro * trained, "all_gather": 8 * gathers}


def embeds(model: Transformer) -> bool:
    """Whether the embedding learns."""
    return model.model.embed_tokens.weight.requires_grad


def check(rank: int, ranks: int, folder: str, checks: list[Check], ways: Ways) -> None:
    """Run the checks in one of `ranks` processes; writes {name: what it found, or a traceback in text}."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    found = {}
    for run in checks:
        name = run.__name__
        meeting = f"file://{folder}/meeting-{name}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
        try:
            found[name] = run(ways)
        except Exception:
            found[name] = traceback.format_exc()
        dist.destroy_process_group()
    Path(folder, str(rank)).write_text(json.dumps(found), encoding="utf-8")


def in_processes(folder: Path, ranks: int, checks: list[Check], ways: Ways) -> dict[str, Any]:
    """What the checks found on each of `ranks` processes: {name: [of rank 0, ...]}; an error fails the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hanlin.train.objective"])
    processes = [context.Process(target=check, args=(rank, ranks, str(folder), checks, ways)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    found = [json.loads((folder / str(rank)).read_text(encoding="utf-8")) for rank in range(ranks)]
    for mine in found:
        for name, said in mine.items():
            assert not (isinstance(said, str) and said.startswith("Traceback")), f"{name}: {said}"
    return {run.__name__: [mine[run.__name__] for mine in found] for run in checks}
