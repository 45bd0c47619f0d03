"""What each process of the training tests does: AdamW steps of a tiny model that is laid over a group, in fp64, beside
the same steps in one process."""

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
)
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import RouterConfig
from hanlin.parallel import (
    copies,
    crossing,
    expert,
    expert_parameters,
    gather,
    gather_experts,
    shard,
    split_experts,
    tensor,
    vocabulary,
)
from hanlin.parallel import sequence as sequence_parallel
from hanlin.train.balance import Balance
from hanlin.train.objective import CausalLM, step_loss
from hanlin.train.settings import BalanceByLoss
from hanlin.train.token_loss import token_sums

VOCABULARY, WIDTH, ROWS, STEPS, Z_LOSS, CLIP = 61, 32, 4, 6, 0.01, 2.0
PLAIN = AttentionConfig(4, 2, 8)
QWEN3 = replace(PLAIN, qk_norm=True)
DRESSED = replace(PLAIN, qkv_bias=True, output_bias=True, softcap=3.0, sinks=True)
LATENT = LatentAttentionConfig(heads=4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, q_rank=12)
DENSE, BIASED = FeedForwardConfig(40), FeedForwardConfig(40, bias=True)
EXPERTS = ExpertsConfig(4, 16, RouterConfig(2), bias=True, shared_hidden=8, shared_gate=True)
CAPACITY = ExpertsConfig(4, 16, RouterConfig(2, capacity_factor=0.8))
SCALED = ExpertsConfig(4, 16, RouterConfig(1, kind="sigmoid", renormalise=False), scale_input=True)


@dataclass(frozen=True)
class Laid:
    """A model and how it lies over the ranks. tensor, expert: sizes of the axes; expert is the outer one."""

    layers: tuple[LayerConfig, ...]
    tied: bool = False
    sequence: bool = False
    tensor: int = 1
    expert: int = 1
    length: int = 16
    more: tuple[tuple[str, Any], ...] = ()

    def model(self) -> Transformer:
        """Every parameter random, the same in every process, fp64."""
        torch.manual_seed(3)
        config = ModelConfig("qwen3", VOCABULARY, WIDTH, self.layers, tied_embeddings=self.tied, **dict(self.more))
        model = Transformer(config).double()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
        return model


def both(*layers: LayerConfig, **rest: Any) -> Callable[..., Laid]:
    return lambda **where: Laid(layers, **{**rest, **where})


MODELS = {
    "llama": both(LayerConfig(PLAIN, DENSE), LayerConfig(PLAIN, DENSE)),
    "tied": both(LayerConfig(QWEN3, DENSE), LayerConfig(QWEN3, BIASED), tied=True),
    "experts": both(LayerConfig(QWEN3, EXPERTS), LayerConfig(PLAIN, CAPACITY)),
    "dressed": both(
        LayerConfig(DRESSED, BIASED, norms="sandwich"), LayerConfig(DRESSED, SCALED, norms="post"), length=13,
        more=(("head", HeadConfig(bias=True, softcap=4.0, scale=0.7)),),
    ),
    "latent": both(LayerConfig(LATENT, DENSE), LayerConfig(LATENT, EXPERTS)),
    "ahead": both(LayerConfig(QWEN3, DENSE), LayerConfig(QWEN3, DENSE), tied=True, more=(("predict_ahead", 2),)),
}  # fmt: skip


def batch_of(step: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (ROWS, length), generator=generator)
    starts = torch.rand(ROWS, length, generator=generator) < 0.15
    starts[:, 5] = True  # so that no row is one document: then padding reads less, and takes other places in experts
    documents = starts.long().cumsum(1)
    documents[0, -length // 4 :] = -1  # the rows hold unequally many targets
    return Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    ids, targets, positions, documents = (
        t[start:stop] for t in (batch.ids, batch.targets, batch.positions, batch.documents)
    )
    return Batch(ids, targets, positions, documents)


class WithZ(CausalLM):
    """And a z-loss."""

    def score(self, model: Transformer, output: Any, batch: Batch) -> Any:
        terms, metrics = super().score(model, output, batch)
        _, squares = token_sums(model, output.hidden, batch.targets)
        return [*terms, (squares * Z_LOSS, "tokens")], metrics


def train(laid: Laid, model: Transformer, groups: tuple[Any, Any] = (None, None)) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of AdamW steps with clipping. groups: of the tensor and the expert axis."""
    split = laid.expert if groups[1] is not None else 1
    index = dist.get_rank(groups[1]) if split > 1 else 0
    objective = WithZ(ahead=dict(laid.more).get("predict_ahead", 0))
    balance = Balance(model, BalanceByLoss(kind="loss", weight=0.1), z_loss=0.01, group=groups[1])
    own, held = expert_parameters(model), copies(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        batch = batch_of(step, laid.length)
        totals = {**objective.count(batch), "routed tokens": float((batch.documents >= 0).sum())}
        mine = rows_of(batch, index * ROWS // split, (index + 1) * ROWS // split)
        optimizer.zero_grad()
        output = objective.run(model, mine)
        terms, _ = objective.score(model, output, mine)
        terms += balance.terms(output.routing, mine.documents >= 0)
        loss = step_loss(terms, totals)
        loss.backward()
        loss = loss.detach()
        if split > 1:
            dist.all_reduce(loss, group=groups[1])
            for name, parameter in model.named_parameters():
                if name not in own:
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad, group=groups[1])
        balance.finish()
        square = torch.zeros((), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                square += parameter.grad.square().sum() / held[name] / (1 if name in own else split)
        for group in groups:
            if group is not None:
                dist.all_reduce(square, group=group)
        norm = float(square.sqrt())
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, CLIP / norm))
        optimizer.step()
        losses.append(float(loss))
        norms.append(norm)
    return losses, norms


def groups_of(laid: Laid) -> tuple[Any, Any]:
    """Neighbours share a tensor group; every rank makes every group."""
    T, E = laid.tensor, laid.expert
    rows = [dist.new_group([e * T + t for t in range(T)]) for e in range(E)]
    columns = [dist.new_group([e * T + t for e in range(E)]) for t in range(T)]
    rank = dist.get_rank()
    return rows[rank // T] if T > 1 else None, columns[rank % T] if E > 1 else None


def gap(laid: Laid) -> dict[str, float]:
    """How far losses, norms and weights are from those of one process, and replicated weights from the other ranks'."""
    alone = laid.model()
    losses, norms = train(laid, alone)
    model, groups = laid.model(), groups_of(laid)
    if laid.tensor > 1:
        shard(model, groups[0], sequence=laid.sequence)
    if laid.expert > 1:
        split_experts(model, groups[1])
    found, found_norms = train(laid, model, groups)
    whole: dict[str, Tensor] = {}
    if laid.expert > 1:
        whole = gather_experts(model, groups[1])
    if laid.tensor > 1:
        values = {id(p): whole.get(name, p.detach()) for name, p in model.named_parameters()}
        whole = gather(model, groups[0], of=lambda p: values[id(p)])
    whole = {**{name: p.detach() for name, p in model.named_parameters()}, **whole}
    wanted = dict(alone.named_parameters())
    assert whole.keys() == wanted.keys()
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, found, strict=True)),
        "norms": max(abs(a - b) / a for a, b in zip(norms, found_norms, strict=True)),
        "weights": max(float((whole[n] - p.detach()).norm() / p.detach().norm()) for n, p in wanted.items()),
        "apart": apart(model, groups),
    }


def apart(model: Transformer, groups: tuple[Any, Any]) -> float:
    """How many weights that several ranks hold differ in a bit between them."""
    experts, held = expert_parameters(model), copies(model)
    whole = [p.detach() for name, p in model.named_parameters() if name not in experts]
    if groups[0] is not None:
        ranks = dist.get_world_size(groups[0])
        whole = [p.detach() for name, p in model.named_parameters() if held[name] == ranks]
    first = [p.clone() for p in whole]
    for tensor_ in first:
        dist.broadcast(tensor_, group=groups[0] or groups[1], group_src=0)
    return float(sum(int((a != b).sum()) for a, b in zip(first, whole, strict=True)))


# name -> what is made wrong: (module or class, its attribute, what stands there instead)
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "no sum into a block": (crossing, "copy_in", lambda x, group: x),
    "no sum out of a block": (crossing, "sum_out", lambda x, group: x),
    "no sum of a norm's gradient": (crossing, "on_gradient", lambda parameter, hook: None),
    "no sum of a query norm's gradient": (tensor, "on_gradient", lambda parameter, hook: None),
    "a loss of the own tokens": (vocabulary, "all_sum", lambda x, group: x),
    "no sum of the head's gradient": (vocabulary, "copy_in", lambda x, group: x),
    "a gathered gradient not summed": (
        sequence_parallel, "_reduce_scatter", lambda x, tokens, length: sequence_parallel._own(x, tokens, length)
    ),
    "a router counted by every rank": (sequence_parallel, "_put_own", sequence_parallel._same),
    "the wrong tokens": (sequence_parallel, "_put", lambda x, tokens, length: x.new_zeros(x.shape[0], length, WIDTH)),
    "the wrong experts": (expert, "share", lambda units, rank, ranks: equal(units, ranks - 1 - rank, ranks)),
    "rows that stay": (expert, "_all_to_all", lambda x, sent, got, group: x.new_zeros(sum(got), *x.shape[1:])),
    "weights forgotten": (
        expert._Combine, "forward", staticmethod(lambda ctx, y, weights, plan: unweighed(ctx, y, weights, plan))
    ),
}  # fmt: skip


def equal(units: int, rank: int, ranks: int) -> tuple[int, int]:
    return rank * units // ranks, (rank + 1) * units // ranks


def unweighed(ctx: Any, y: Tensor, weights: Tensor | None, plan: Any) -> Tensor:
    ctx.plan = plan
    ctx.save_for_backward(y, weights)
    return plan.combine(y, None)


def work(rank: int, world: int, folder: str, cases: dict[str, Laid], mutants: dict[str, str]) -> None:
    """Every case, then every mutant (name -> the case it spoils); writes {name: gaps} or the error to `folder`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    told: dict[str, Any] = {}
    try:
        for name, laid in cases.items():
            told[name] = gap(laid)
        for name, case in mutants.items():
            owner, attribute, wrong = MUTANTS[name]
            right = owner.__dict__[attribute]
            setattr(owner, attribute, wrong)
            told[name] = gap(cases[case])
            setattr(owner, attribute, right)
    except Exception:
        told["error"] = traceback.format_exc()
    Path(folder, f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    if "error" not in told:
        dist.destroy_process_group()
