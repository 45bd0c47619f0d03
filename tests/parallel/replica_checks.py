"""What each of several processes of `test_data` and `test_zero` checks, for the ways it is given."""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tests.parallel.replicas import (
    KINDS,
    MICRO,
    ROWS,
    STEPS,
    Ways,
    adam,
    formula,
    gap,
    gradient_gap,
    loss_of,
    model_of,
    replicate,
    run_step,
    steps_of,
    train_alone,
    train_together,
)
from tests.train.tiny_training import TinySource
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.parallel import gather, shard
from hanlin.parallel.data import DataParallel
from hanlin.parallel.replication import Replication
from hanlin.parallel.tracer import Tracer
from hanlin.parallel.zero import Zero
from hanlin.train.objective import CausalLM, document_mask


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
            run_step(model, [replication], step)
            optimizer.step()
            replication.publish()
            dist.barrier()
            time.sleep(0.2)  # gloo's threads let go of what they have sent
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
