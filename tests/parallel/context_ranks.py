"""What each process of `test_context` computes: models that share rows over a group, beside the same in one process."""

import json
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    LogN,
    ModelConfig,
)
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import RouterConfig
from hanlin.parallel import context as context_parallel
from hanlin.parallel import ring
from hanlin.parallel.context import ContextParallel
from hanlin.parallel.tensor import gather, shard
from hanlin.parallel.tracer import Tracer
from hanlin.train.objective import CausalLM, step_loss

VOCABULARY, WIDTH, ROWS, LENGTH = 61, 32, 3, 48
PLAIN = AttentionConfig(4, 2, 8)
WINDOW = replace(PLAIN, window=7)
DRESSED = replace(
    PLAIN, kv_heads=4, qkv_bias=True, qk_norm=True, softcap=3.0, sinks=True, query_scaling=LogN(trained=6), window=9
)
LATENT = LatentAttentionConfig(heads=4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, q_rank=12)
DENSE = FeedForwardConfig(40)
EXPERTS = ExpertsConfig(4, 16, RouterConfig(2), shared_hidden=8, shared_gate=True)


def model_of(*layers: LayerConfig) -> Transformer:
    """Every parameter random, the same in every process, fp64."""
    torch.manual_seed(3)
    model = Transformer(ModelConfig("qwen3", VOCABULARY, WIDTH, layers)).double()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.2)
    return model


def batch_of(step: int, *, length: int = LENGTH, packed: bool = True, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 0.15
    documents = starts.long().cumsum(1) if packed else torch.zeros_like(ids)
    documents[0, -length // 4 :] = -1  # padding of the data's own
    return Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)


CASES = {
    "dense": ([LayerConfig(PLAIN, DENSE), LayerConfig(WINDOW, DENSE)], {}),
    "one document a row": ([LayerConfig(PLAIN, DENSE), LayerConfig(WINDOW, DENSE)], {"packed": False}),
    "experts": ([LayerConfig(PLAIN, EXPERTS), LayerConfig(PLAIN, EXPERTS)], {}),
    "odd length": ([LayerConfig(PLAIN, DENSE), LayerConfig(PLAIN, EXPERTS)], {"length": 37}),
    "soft-cap, sinks, scaled queries": ([LayerConfig(DRESSED, DENSE), LayerConfig(DRESSED, DENSE)], {}),
    "latent": ([LayerConfig(LATENT, DENSE), LayerConfig(LATENT, EXPERTS)], {}),
    "recomputed": ([LayerConfig(PLAIN, DENSE), LayerConfig(WINDOW, EXPERTS)], {}),
}
STEPS = 5


def recompute(model: Transformer) -> None:
    """Every layer's activations are made again in the backward pass."""
    for layer in model.model.layers:
        plain = layer.forward
        layer.forward = lambda x, shared, plain=plain: checkpoint(plain, x, shared, use_reentrant=False)


def train(model: Transformer, batches: list[Batch], context: ContextParallel | None) -> list[float]:
    """Losses of AdamW steps; over a context the gradients and losses of the ranks are added up."""
    objective = CausalLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for batch in batches:
        totals = objective.count(batch)
        optimizer.zero_grad()
        terms, _ = objective.loss(model, batch if context is None else context.cut(batch))
        loss = step_loss(terms, totals)
        loss.backward()
        shown = loss.detach().clone()
        if context is not None:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad, group=context.group)
            dist.all_reduce(shown, group=context.group)
        optimizer.step()
        losses.append(float(shown))
    return losses


def gap(case: str, kind: str, group=None) -> float:
    """The largest difference from one process, of losses and weights."""
    layers, shape = CASES[case]
    alone = model_of(*layers)
    shared = deepcopy(alone)
    batches = [batch_of(step, **shape) for step in range(STEPS)]
    context = ContextParallel(group, kind)
    context.attach(shared)
    if case == "recomputed":
        recompute(shared)
    wanted, found = train(alone, batches, None), train(shared, batches, context)
    assert len(set(wanted)) == STEPS
    between = max(abs(a - b) for a, b in zip(wanted, found, strict=True))
    weights = dict(alone.named_parameters())
    return max(between, *(float((p - weights[name]).detach().abs().max()) for name, p in shared.named_parameters()))


# --- mutations: each must be seen ---


def unweighted_merge(first, second):
    out, lse = first
    return out + second[0], torch.logaddexp(lse, second[1])


def dropped_step(mask, chunks, rank, device, plain=ring.ring_plan):
    plan = plain(mask, chunks, rank, device)
    return [*plan[:-1], []]


def consecutive_positions(self, batch, plain=ContextParallel.cut):
    cut = plain(self, batch)
    start = self.rank * cut.ids.shape[1]
    return replace(cut, positions=batch.positions[:, start : start + cut.ids.shape[1]])


class GradientsThatStay(ring._Travel):
    """Gradients of keys and values are not sent home."""

    def __init__(self, tensor, group, tag):
        self._tag = tag
        super().__init__(tensor, group, tag)

    def arrived(self):
        found = super().arrived()
        return torch.zeros_like(found) if self._tag == ring.GRADIENTS else found


MUTATIONS = {
    "the weights of the merge are missing": (ring, "merge", unweighted_merge),
    "a step of the ring is dropped": (context_parallel, "ring_plan", dropped_step),
    "positions are consecutive": (ContextParallel, "cut", consecutive_positions),
    "gradients stay where they were made": (ring, "_Travel", GradientsThatStay),
}


def mutated(name: str) -> float:
    place, attribute, wrong = MUTATIONS[name]
    right = getattr(place, attribute)
    setattr(place, attribute, wrong)
    try:
        return gap("one document a row", "ring")
    finally:
        setattr(place, attribute, right)


def subgroup(ranks: int) -> float:
    """The second half of the processes shares rows of its own: ranks of the group are not ranks of the world."""
    halves = [dist.new_group(part.tolist()) for part in torch.arange(ranks).chunk(2)]
    mine = halves[dist.get_rank() * 2 // ranks]
    return max(gap("dense", kind, mine) for kind in ("ring", "ulysses"))


def sent_bytes() -> dict[str, dict[str, int]]:
    """Payload of one layer's calls by operation, forward and backward."""
    found: dict[str, dict[str, int]] = {}
    for kind in ("ring", "ulysses"):
        for dtype in (torch.float64, torch.bfloat16):
            model, context = model_of(LayerConfig(PLAIN, DENSE)).to(dtype), ContextParallel(None, kind)
            context.attach(model)
            batch = context.cut(batch_of(0))
            with Tracer() as tracer:
                terms, _ = CausalLM().loss(model, batch)
            found[f"{kind} forward {dtype.itemsize}"] = tracer.bytes()
            with Tracer() as tracer:
                terms[0][0].backward()
            found[f"{kind} backward {dtype.itemsize}"] = tracer.bytes()
    return found


def with_tensor_parallel() -> float:
    """2 x 2: halves of heads and matrices, halves of rows. The largest difference of the loss and of gradients."""
    layers = [LayerConfig(PLAIN, DENSE), LayerConfig(WINDOW, DENSE)]
    alone, batch, rank = model_of(*layers), batch_of(0), dist.get_rank()
    shared = deepcopy(alone)
    tensor = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    rows = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    shard(shared, tensor)
    worst = 0.0
    for kind in ("ring", "ulysses"):
        context = ContextParallel(rows, kind)
        context.attach(shared)
        alone.zero_grad()
        shared.zero_grad()
        wanted, found = CausalLM().loss(alone, batch)[0][0][0], CausalLM().loss(shared, context.cut(batch))[0][0][0]
        wanted.backward()
        found.backward()
        loss = found.detach().clone()
        dist.all_reduce(loss, group=rows)
        slopes = gather(shared, tensor, of=lambda p: p.grad)
        worst = max(worst, abs(float(loss - wanted.detach())))
        for name, parameter in alone.named_parameters():
            slope = slopes[name].clone()
            dist.all_reduce(slope, group=rows)
            worst = max(worst, float((slope - parameter.grad).abs().max()))
    return worst


def low_precision(kind: str) -> tuple[float, float]:
    """Relative error of the bf16 gradient against fp64: shared over the ranks, and in one process."""
    layers, _ = CASES["dense"]
    truth, batch, context = model_of(*layers), batch_of(0), ContextParallel(None, kind)
    found = []
    for dtype, cut in ((torch.float64, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        model = deepcopy(truth)
        model.compute_dtype = dtype
        model = model if dtype == torch.float64 else model.float()
        if cut:
            context.attach(model)
        terms, _ = CausalLM().loss(model, context.cut(batch) if cut else batch)
        terms[0][0].backward()
        slope = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        if cut:
            dist.all_reduce(slope)
        found.append(slope)
    return tuple(float((slope - found[0]).norm() / found[0].norm()) for slope in found[1:])


def whole_rows_are_refused(kind: str) -> list[str]:
    """What is said of a batch that was not cut, and whether `paused` reads it as one process does."""
    layers, _ = CASES["dense"]
    alone, batch = model_of(*layers), batch_of(0)
    shared, context = deepcopy(alone), ContextParallel(None, kind)
    context.attach(shared)
    said = []
    for whole in (batch, batch_of(0, packed=False)):
        try:
            CausalLM().loss(shared, whole)
            said.append("nothing")
        except HanlinError as error:
            said.append(f"HanlinError: {error}")
    with context.paused():
        equal = torch.equal(CausalLM().loss(shared, batch)[0][0][0], CausalLM().loss(alone, batch)[0][0][0])
    return [*said, str(equal), str(shared.context is context)]


def compare(rank: int, ranks: int, folder: str) -> None:
    """Writes what was found as JSON to `folder`/rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    found: dict[str, object] = {f"{kind}: {case}": gap(case, kind) for kind in ("ring", "ulysses") for case in CASES}
    found["bytes"] = sent_bytes()
    found["bf16"] = {kind: low_precision(kind) for kind in ("ring", "ulysses")}
    found["whole"] = {kind: whole_rows_are_refused(kind) for kind in ("ring", "ulysses")}
    if ranks == 2:
        found |= {name: mutated(name) for name in MUTATIONS}
    else:
        found["subgroup"] = subgroup(ranks)
        found["tensor"] = with_tensor_parallel()
    Path(folder, str(rank)).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
