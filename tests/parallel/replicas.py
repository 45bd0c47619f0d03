"""What each of several processes of `test_data`, `test_zero` and `test_tracer` does: a few steps over replicas in fp64,
beside the same steps in one process. What it finds is written to a file as JSON."""

import gc
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import RouterConfig
from hanlin.parallel import gather, shard
from hanlin.parallel.collectives import copy_in
from hanlin.parallel.data import DataParallel
from hanlin.parallel.flat import Flat
from hanlin.parallel.replication import Replication
from hanlin.parallel.tracer import Tracer
from hanlin.parallel.zero import Zero
from hanlin.train.choices import Recompute
from hanlin.train.objective import CausalLM, document_mask
from hanlin.train.recompute import recompute_layers
from hanlin.tune.lora import add_lora

ROWS, STEPS, MICRO = 8, 6, 2
KINDS = ("untied", "tied", "moe", "lora", "frozen start", "recomputed")
Ways = tuple[str, ...]  # of: data, zero1, zero2, zero3


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


# --- what the processes check; each returns something that JSON can hold ---


def equals_one_process(ways: Ways) -> dict[str, float]:
    found = {}
    for kind in KINDS:
        wanted = train_alone(kind)
        for way in ways:
            model = model_of(kind)
            replication = replicate(model, way, dist.group.WORLD)
            steps_of(model, [replication])
            found[f"{way} {kind}"] = gap(model, wanted, replication)
    return found


def without_last(ways: Ways) -> dict[str, float]:
    return {way: train_together("untied", way, last=False) for way in ways}


def experts_apart(ways: Ways) -> dict[str, float]:
    """Dense parameters and experts in two sets over two groups, as expert parallelism has them."""
    found, wanted = {}, train_alone("moe")
    other = dist.new_group()
    for way in ways:
        model = model_of("moe")
        named = dict(model.named_parameters())
        experts = {name: p for name, p in named.items() if ".experts." in name}
        dense = {name: p for name, p in named.items() if name not in experts}
        assert experts and dense
        if way == "data":
            both: list[Replication] = [DataParallel(dense, dist.group.WORLD), DataParallel(experts, other)]
        else:
            stage = int(way[-1])
            both = [Zero(model, dense, dist.group.WORLD, stage), Zero(model, experts, other, stage)]
        steps_of(model, both)
        found[way] = gap(model, wanted, *both)
    return found


def unused_counts_as_zero(ways: Ways) -> dict[str, float]:
    """Only rank 0 uses the second layer's feed-forward in the first micro-batch, nobody in the second: gradients are
    what rank 0 alone has."""
    found = {}
    for way in ways:
        model, whole = model_of("untied"), model_of("untied")
        replication = replicate(model, way, dist.group.WORLD)
        replication.begin()
        for part in range(2):
            for each, rank in ((model, dist.get_rank()), *((whole, r) for r in range(dist.get_world_size()))):
                mlp = each.model.layers[1].mlp
                mlp.forward = _scaled(mlp, 1.0 if rank == 0 and part == 0 else None)
                loss_of(each, part, rank, rank + 1).backward()
        replication.finish()
        found[way] = gradient_gap(replication, whole)
    return found


def _scaled(mlp: Any, factor: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.zeros_like(x) if factor is None else type(mlp).forward(mlp, x) * factor


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


def bytes_of_a_step(ways: Ways) -> dict[str, Any]:
    """Measured payloads of the second step and the formulas of the docstrings, by way, kind and micro-batches."""
    found = {}
    for way in ways:
        for kind in KINDS:
            for micro in (1, 2):
                model = model_of(kind)
                replication = replicate(model, way, dist.group.WORLD)
                optimizer = adam(replication.pieces.values())
                for step in range(2):
                    with Tracer() as tracer:
                        run_step(model, [replication], step, micro)
                        optimizer.step()
                        replication.publish()
                        if way in ("zero1", "zero2"):
                            replication.begin()  # waits for what was published
                found[f"{way} {kind} {micro}"] = [tracer.bytes(), formula(model_of(kind), way, micro)]
    return found


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


def memory(ways: Ways) -> dict[str, Any]:
    """By way: bytes of the weights of a model of 16 equal layers, the most that lived at a time in a step (an optimiser
    of two states included), and what lives before the next, all from the profiler's events of allocation."""
    return {way: memory_of(way) for way in ways}


def memory_of(way: str) -> list[int]:
    config = ModelConfig.uniform(
        "llama", depth=16, attention=AttentionConfig(4, 4, 16), feed_forward=FeedForwardConfig(256), vocab_size=61,
        width=64, tied_embeddings=True,
    )  # fmt: skip
    gc.collect()  # what is given back now, is not counted as given back in the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        model = Transformer(config).double()
        weights = sum(p.nbytes for p in model.parameters())
        replication = replicate(model, way, dist.group.WORLD)
        optimizer = torch.optim.Adam(list(replication.pieces.values()), foreach=False)
        for step in range(2):
            run_step(model, [replication], step, micro=1)
            optimizer.step()
            replication.publish()
            with torch.profiler.record_function(f"done {step}"):
                pass
    now = peak = idle = 0
    for event in sorted(watch.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
        elif event.name() == "done 0":
            peak = now  # of the second step
        elif event.name() == "done 1":
            idle = now
    replication.close()
    return [weights, peak, idle]


def packed_stay_views(ways: Ways) -> dict[str, bool]:
    """The projections' common matrix is a part of the flat buffer: one storage, and no copy is made of it."""
    found = {}
    for way in ways:
        model = model_of("moe")
        replication = replicate(model, way, dist.group.WORLD)
        steps_of(model, [replication])
        with replication.whole():
            good = True
            for layer in model.model.layers:
                attention = layer.self_attn
                joined = attention.joined_weight()
                good &= joined.data_ptr() == attention.q_proj.weight.data_ptr()
                good &= joined.untyped_storage().data_ptr() == layer.input_layernorm.weight.untyped_storage().data_ptr()
                good &= (
                    layer.self_attn.q_proj.bias.data_ptr()
                    == attention._joined("bias", [p.bias for p in attention.projections()]).data_ptr()
                )
        found[way] = good
    return found


def loading_reaches_the_pieces(ways: Ways) -> dict[str, float]:
    """Weights that are copied in inside `whole()`; then `close` leaves a plain model."""
    found = {}
    for way in ways:
        model, other = model_of("untied"), model_of("untied")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        replication = replicate(model, way, dist.group.WORLD)
        with replication.whole():
            model.load_state_dict(other.state_dict())
        named, worst = dict(other.named_parameters()), 0.0
        for name, piece in replication.pieces.items():
            start, stop = replication.ranges[name]
            worst = max(worst, float((piece.flatten() - named[name].flatten()[start:stop]).abs().max().detach()))
        with replication.whole(), torch.no_grad():
            ids = TinySource(ROWS).batch(0).ids
            worst = max(worst, float((model(ids).logits - other(ids).logits).abs().max()))
        replication.close()
        worst = max(worst, float((model(ids).logits - other(ids).logits).abs().max().detach()))
        loss_of(model, 0, 0, 2).backward()
        assert all(p.grad is not None for p in model.parameters())
        found[way] = worst
    return found


def refusals(_: Ways) -> dict[str, str]:
    found = {}

    def note(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
            found[name] = "nothing was raised"
        except HanlinError as error:
            found[name] = str(error)

    model = model_of("untied")
    group = dist.group.WORLD
    note("alone", lambda: Zero(model, dict(model.named_parameters()), None, 1))
    note("stage", lambda: Zero(model, dict(model.named_parameters()), group, 4))
    half = model_of("untied").bfloat16()
    note("half", lambda: Zero(half, dict(half.named_parameters()), group, 2))
    zero = Zero(model, dict(model.named_parameters()), group, 3)
    note("state", model.state_dict)
    note("state of a layer", model.model.layers[1].state_dict)
    note("load", lambda: model.load_state_dict(model_of("untied").state_dict()))
    with zero.whole():
        note("whole", model.state_dict)
    cast = model_of("untied")
    moved = Zero(cast, dict(cast.named_parameters()), group, 2)
    cast.float()
    note("cast", moved.begin)
    for way in ("data", "zero1"):
        twice = model_of("untied")
        replication = replicate(twice, way, group)
        replication.begin()
        with replication.last():
            loss_of(twice, 0, 0, 1).backward()
            note(f"two backwards {way}", lambda: loss_of(twice, 0, 0, 1).backward())  # noqa: B023
        replication.finish()
    return found


def backward_without_weights(ways: Ways) -> str:
    """A backward that leaves the gradients of weights for later, as zero bubble does: refused by zero3, which will have
    given the weights back; served by the others."""
    said = ""
    for way in ways:
        model, whole = model_of("untied"), model_of("untied")
        replication = replicate(model, way, dist.group.WORLD)
        replication.begin()
        layer, before = model.model.layers[1], model.model.layers[0]
        kept = []
        handle = before.register_forward_hook(lambda _, __, out: kept.append(out))  # noqa: B023
        loss = loss_of(model, 0, 0, 2)
        handle.remove()
        if way == "zero3":
            try:
                torch.autograd.grad(loss, kept)
            except HanlinError as error:
                said = str(error)
            continue
        torch.autograd.grad(loss, kept, retain_graph=True)
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        replication.finish()
        for _ in range(dist.get_world_size()):
            loss_of(whole, 0, 0, 2).backward()
        assert gradient_gap(replication, whole) < 1e-12, way
        del layer
    return said


def mixed_precision(ways: Ways) -> dict[str, float]:
    """bf16 activations over fp32 weights: relative distance of the whole gradient from one process's."""
    found = {}
    for way in ways:
        model, whole = model_of("moe").float(), model_of("moe").float()
        for each in (model, whole):
            each.compute_dtype = torch.bfloat16
        replication = replicate(model, way, dist.group.WORLD)
        run_step(model, [replication], 0)
        rows = ROWS // dist.get_world_size() // MICRO
        for start in range(0, ROWS, rows):
            loss_of(whole, 0, start, start + rows).backward()
        found[way] = gradient_gap(replication, whole)
    return found


def mutants(ways: Ways) -> dict[str, float]:
    """The same comparison with something broken; each must be seen."""
    found = {}
    for way in ways:
        for name, broken in MUTATIONS.items():
            if name.startswith(("reduce", "gather", "share")) and way == "data":
                continue
            if name.startswith("all-reduce") and way != "data":
                continue
            with broken():
                found[f"{way}: {name}"] = train_together("untied", way)
    return found


@contextmanager
def swapped(owner: Any, name: str, new: Any) -> Generator[None]:
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


class Done:
    def wait(self) -> None:
        pass


def _mean(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: torch.Tensor, **rest: Any) -> Any:
        tensors[-1].div_(dist.get_world_size())
        return call(*tensors, **rest)

    return run


def _local_share(mine: torch.Tensor, whole: torch.Tensor, **_: Any) -> Done:
    mine.copy_(whole.chunk(dist.get_world_size())[dist.get_rank()])
    return Done()


def _neighbours_share(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(mine: torch.Tensor, whole: torch.Tensor, **rest: Any) -> Any:
        return call(mine, whole.roll(len(mine)), **rest)

    return run


PIECES = Flat.pieces
MUTATIONS: dict[str, Callable[[], Any]] = {
    "all-reduce skipped": lambda: swapped(dist, "all_reduce", lambda *_, **__: Done()),
    "all-reduce of means": lambda: swapped(dist, "all_reduce", _mean(dist.all_reduce)),
    "reduce skipped": lambda: swapped(dist, "reduce_scatter_tensor", _local_share),
    "reduce of means": lambda: swapped(dist, "reduce_scatter_tensor", _mean(dist.reduce_scatter_tensor)),
    "reduce of a neighbour's share": lambda: swapped(
        dist, "reduce_scatter_tensor", _neighbours_share(dist.reduce_scatter_tensor)
    ),
    "gather skipped": lambda: swapped(dist, "all_gather_into_tensor", lambda *_, **__: Done()),
}


def fsdp2(ways: Ways) -> dict[str, float]:
    """Gradients and weights of torch's own `fully_shard` after the same steps."""
    reference = model_of("untied")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in reference.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(reference, mesh=mesh)
    for module in (*reference.model.layers, reference):
        module.set_gradient_divide_factor(1.0)
    optimizer = adam(reference.parameters())
    rank, ranks, rows = dist.get_rank(), dist.get_world_size(), ROWS // dist.get_world_size() // MICRO
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(MICRO):
            start = rank * ROWS // ranks + part * rows
            objective, source = CausalLM(), TinySource(ROWS)
            batch = source.batch(step, start, start + rows)
            logits = reference(batch.ids, positions=batch.positions, mask=document_mask(batch)).logits
            loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            (loss / objective.count(source.batch(step))["tokens"]).backward()
        optimizer.step()
    wanted = {name: p.full_tensor().detach() for name, p in reference.named_parameters()}
    found = {}
    for way in ways:
        model = model_of("untied")
        replication = replicate(model, way, dist.group.WORLD)
        steps_of(model, [replication])
        found[way] = gap(model, wanted, replication)
    return found


def over_a_tensor_cut(ways: Ways) -> dict[str, float]:
    """2 replicas of a model that is cut over 2 ranks (rank = 2 * data + tensor), as 3 steps of one process."""
    rank, found = dist.get_rank(), {}
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    tensor, data = rows[rank // 2], columns[rank % 2]

    def learn(model: Transformer, step: int, start: int, stop: int) -> None:
        batch = TinySource(ROWS).batch(step, start, stop)
        logits = model(batch.ids, positions=batch.positions, mask=document_mask(batch)).logits
        (cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum") / 100).backward()

    for kind in ("untied", "tied", "moe"):
        whole = model_of(kind)
        optimizer = adam(whole.parameters())
        for step in range(3):
            optimizer.zero_grad()
            learn(whole, step, 0, ROWS)
            optimizer.step()
        for way in ways:
            model = shard(model_of(kind), tensor)
            replication = replicate(model, way, data)
            optimizer = adam(replication.pieces.values())
            for step in range(3):
                replication.begin()
                for part in range(2):
                    start = (rank // 2) * ROWS // 2 + part * ROWS // 4
                    with replication.last() if part else nullcontext():
                        learn(model, step, start, start + ROWS // 4)
                replication.finish()
                optimizer.step()
                replication.publish()
            with replication.whole(), torch.no_grad():
                joined = gather(model, tensor)
                gaps = [(joined[n] - p).norm() / p.norm() for n, p in whole.named_parameters()]
            found[f"{way} {kind}"] = float(max(gaps))
    return found


def every_call(_: Ways) -> dict[str, Any]:
    """[operation, payload, ranks] of every call, in order; and of a group of one's own; and in a backward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, whole = torch.ones(6), torch.ones(6 * ranks, dtype=torch.float64)
    parts = [torch.empty(6) for _ in range(ranks)]
    other, pair = (rank + 1) % ranks, dist.new_group([0, 1])
    with Tracer() as tracer:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.all_gather_into_tensor(whole, torch.ones(6, dtype=torch.float64), async_op=True).wait()
        dist.all_gather(parts, x)
        dist.reduce_scatter_tensor(torch.empty(6, dtype=torch.float64), whole)
        dist.all_to_all_single(torch.empty_like(whole), whole)
        dist.all_to_all(parts, [x.clone() for _ in range(ranks)])
        dist.broadcast(x, src=0)
        dist.reduce(x, dst=0)
        for work in dist.batch_isend_irecv([
            dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, torch.empty(6), (rank - 1) % ranks)
        ]):  # fmt: skip
            work.wait()
        dist.barrier()
        if rank < 2:
            dist.all_reduce(x.bfloat16(), group=pair)
    dist.all_reduce(x)  # after it, nothing is seen
    calls = [[call.op, call.payload, len(call.ranks)] for call in tracer.calls]
    with Tracer() as backward:
        leaf = torch.ones(5, requires_grad=True)
        copy_in(leaf, dist.group.WORLD).sum().backward()
    with Tracer() as functional:
        mesh = init_device_mesh("cpu", (ranks,))
        spread = distribute_tensor(torch.ones(ranks, 4), mesh, [Shard(0)])
        before = len(functional.calls)
        spread.full_tensor()
        spread.sum().full_tensor()
    return {
        "calls": calls, "backward": [[c.op, c.payload] for c in backward.calls],
        "dtensor": [[c.op, c.payload, c.size] for c in functional.calls[before:]],
        "bytes": tracer.bytes(), "pair": tracer.bytes((0, 1)), "wire": tracer.wire(),
    }  # fmt: skip


CHECKS: dict[str, Callable[[tuple[str, ...]], Any]] = {
    function.__name__: function
    for function in (
        equals_one_process, without_last, experts_apart, unused_counts_as_zero, bytes_of_a_step, memory,
        packed_stay_views, loading_reaches_the_pieces, refusals, backward_without_weights, mixed_precision, mutants,
        fsdp2, over_a_tensor_cut, every_call,
    )
}  # fmt: skip


def check(rank: int, ranks: int, folder: str, names: list[str], ways: Ways) -> None:
    """Run the named checks in one of `ranks` processes; writes {name: what it found, or a traceback in text}."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    found = {}
    for name in names:
        meeting = f"file://{folder}/meeting-{name}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
        try:
            found[name] = CHECKS[name](ways)
        except Exception:
            found[name] = traceback.format_exc()
        dist.destroy_process_group()
    Path(folder, str(rank)).write_text(json.dumps(found), encoding="utf-8")


def in_processes(folder: Path, ranks: int, names: list[str], ways: Ways) -> dict[str, Any]:
    """What the named checks found on each of `ranks` processes: {name: [of rank 0, ...]}; an error fails the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hanlin.train.objective"])
    processes = [context.Process(target=check, args=(rank, ranks, str(folder), names, ways)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    found = [json.loads((folder / str(rank)).read_text(encoding="utf-8")) for rank in range(ranks)]
    for mine in found:
        for name, said in mine.items():
            assert not (isinstance(said, str) and said.startswith("Traceback")), f"{name}: {said}"
    return {name: [mine[name] for mine in found] for name in names}
