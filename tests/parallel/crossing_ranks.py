"""What each of two processes checks of split experts, of shared tokens, and of a loss over a cut vocabulary."""

import os
import traceback
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.parallel.training_ranks import EXPERTS, MODELS, VOCABULARY, WIDTH, batch_of

from hanlin.core.errors import HanlinError
from hanlin.models import save_model
from hanlin.models.tensor_plan import share
from hanlin.nn.chunked_head import Head
from hanlin.nn.losses import IGNORE
from hanlin.nn.routing import Routing
from hanlin.parallel import (
    copies,
    cut_of,
    cut_tensor,
    expert_cut,
    expert_parameters,
    gather,
    gather_experts,
    join_tensors,
    replicated,
    shard,
    split_experts,
    vocabulary_parallel_loss,
    vocabulary_parallel_token_sums,
)
from hanlin.parallel.tracer import Tracer
from hanlin.train.choices import Recompute
from hanlin.train.objective import CausalLM
from hanlin.train.recompute import recompute_layers


def routing_of(tokens: int, experts: list[int], seed: int) -> Routing:
    """Two choices a token among `experts`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(experts), generator=generator)[:2] for _ in range(tokens)] or [
        torch.zeros(2, dtype=torch.int64)
    ])[:tokens]  # fmt: skip
    weights = torch.rand(tokens, 2, generator=generator, dtype=torch.float64)
    return Routing(weights, torch.tensor(experts)[chosen], torch.zeros(0), torch.zeros(0))


def any_tokens_travel(rank: int, ranks: int, folder: Path) -> None:
    """Ranks with unequally many tokens, none at all, and experts that nobody chose: outputs within 1e-12, gradients of
    tokens, weights and experts within 1e-11, zeros where no token came; bytes as the docstring says."""
    made = MODELS["experts"]().model()
    whole = made.model.layers[0].mlp.experts
    split = split_experts(deepcopy(made)).model.layers[0].mlp.experts
    cases = [([5, 3], [0, 1, 2, 3]), ([4, 0], [0, 1, 2, 3]), ([3, 2], [2, 3]), ([0, 0], [0, 1, 2, 3])]
    for number, (tokens, experts) in enumerate(cases):
        inputs, routings = [], []
        for owner, count in enumerate(tokens):
            generator = torch.Generator().manual_seed(10 * number + owner)
            inputs.append(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).requires_grad_())
            routing = routing_of(count, experts, 10 * number + owner)
            routing.weights.requires_grad_()
            routings.append(routing)
        for module in (whole, split):
            module.zero_grad()
        outputs = [whole(x, r) for x, r in zip(inputs, routings, strict=True)]
        sum((y * y.detach().cos()).sum() for y in outputs).backward()
        x = inputs[rank].detach().clone().requires_grad_()
        weights = routings[rank].weights.detach().clone().requires_grad_()
        mine = Routing(weights, routings[rank].experts, torch.zeros(0), torch.zeros(0))
        with Tracer() as tracer:
            y = split(x, mine)
            (y * y.detach().cos()).sum().backward()
        assert (y - outputs[rank]).abs().sum() <= 1e-12
        pairs = ((x, inputs[rank]), (weights, routings[rank].weights)) if tokens[rank] else ()
        for ours, theirs in pairs:
            assert (ours.grad - theirs.grad).abs().sum() <= 1e-11
        start, stop = share(4, rank, ranks)
        for (name, ours), theirs in zip(split.named_parameters(), whole.parameters(), strict=True):
            assert (ours.grad - theirs.grad[start:stop]).abs().max() <= 1e-11, (name, number)
        chosen = [int(((r.experts >= start) & (r.experts < stop)).sum()) for r in routings]
        sent, got = 2 * tokens[rank], sum(chosen)
        assert tracer.bytes() == {"all_to_all": 8 * 4 + 2 * (sent + got) * WIDTH * 8}, (number, tracer.bytes())


def split_and_gathered(rank: int, ranks: int, folder: Path) -> None:
    made = MODELS["experts"]().model()
    model = split_experts(deepcopy(made))
    wanted = dict(made.named_parameters())
    names = {name for name in wanted if ".experts." in name}
    assert expert_parameters(model) == names
    found = gather_experts(model)
    assert found.keys() == names and all(torch.equal(found[name], wanted[name]) for name in names)
    for name, parameter in model.named_parameters():
        piece = expert_cut(model, name)
        assert (piece is not None) == (name in names)
        if piece is not None:
            assert torch.equal(parameter, wanted[name][piece.start : piece.stop])
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
    with pytest.raises(HanlinError, match="cannot be saved"):
        save_model(model, folder / f"part-{rank}")
    with pytest.raises(HanlinError, match="split already"):
        split_experts(model)
    with pytest.raises(HanlinError, match="has none"):
        split_experts(MODELS["llama"]().model())
    odd = deepcopy(made)
    odd.model.layers[0].mlp.experts.count = 3
    with pytest.raises(HanlinError, match="3 experts, which 2 ranks"):
        split_experts(odd)


def cut_and_joined(rank: int, ranks: int, folder: Path) -> None:
    """A single tensor is cut as `shard` cuts it, and joined again."""
    made = MODELS["dressed"]().model()
    model = shard(deepcopy(made))
    wanted, held = dict(made.named_parameters()), dict(model.named_parameters())
    assert replicated(model) == {name for name, count in copies(model).items() if count == ranks}
    assert "model.norm.weight" in replicated(model)
    assert "model.layers.0.self_attn.q_proj.weight" not in replicated(model)
    for name, parameter in held.items():
        piece = cut_of(model, name)
        if piece is None:
            assert torch.equal(parameter, wanted[name])
            continue
        parts = [cut_tensor(wanted[name], piece, piece.units, r, ranks) for r in range(ranks)]
        assert torch.equal(parts[rank], parameter), name
        assert torch.equal(join_tensors(parts, piece, piece.units), wanted[name]), name


def recomputed(rank: int, ranks: int, folder: Path) -> None:
    """Layers that run again in the backward pass: gradients equal those without, bit for bit, however laid."""
    batch = batch_of(0, 13)
    for lay in (lambda m: shard(m), lambda m: shard(m, sequence=True), lambda m: split_experts(m)):
        for kind in ("full", "operators"):
            plain, again = (lay(MODELS["experts"]().model()) for _ in range(2))
            recompute_layers(again, Recompute(kind=kind))
            for model in (plain, again):
                terms, _ = CausalLM().loss(model, batch)
                terms[0][0].backward()
            for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
                assert torch.equal(a.grad, b.grad), (kind, name)


def low_precision(rank: int, ranks: int, folder: Path) -> None:
    """bf16 activations over fp32 weights: the loss within 1 % of one process's, gradients within 30 %."""
    batch = batch_of(0, 13)
    for name in ("experts", "dressed", "latent"):
        for lay in (lambda m: shard(m, sequence=True), lambda m: split_experts(m)):
            alone = MODELS[name]().model().float()
            model = lay(deepcopy(alone))
            values = []
            for each in (alone, model):
                each.compute_dtype = torch.bfloat16
                terms, _ = CausalLM().loss(each, batch)
                assert terms[0][0].dtype == torch.float32
                terms[0][0].backward()
                values.append(float(terms[0][0].detach()))
            assert values[1] == pytest.approx(values[0], rel=1e-2)
            if model.part is not None:
                found = gather(model, of=lambda p: p.grad)
                for part, p in alone.named_parameters():
                    if "router" not in part and p.grad.norm() > 0.05:  # a token may go elsewhere by one rounding
                        assert (found[part] - p.grad).norm() <= 0.3 * p.grad.norm(), (name, part)


def loss_over_columns(rank: int, ranks: int, folder: Path) -> None:
    """Cross-entropy and z-loss sums of a cut vocabulary against autograd over all logits, 5 tokens at a time: values
    within 1e-12, gradients within 1e-11; also where no token is trained. 3 numbers a trained token are sent."""
    generator = torch.Generator().manual_seed(1)
    start, stop = share(VOCABULARY, rank, ranks)
    for trained in (True, False):
        hidden = torch.randn(3, 7, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
        targets = torch.randint(0, VOCABULARY, (3, 7), generator=generator)
        targets = targets.masked_fill(torch.rand(3, 7, generator=generator) < (0.3 if trained else 2.0), IGNORE)
        z = 5 * torch.tanh(0.7 * F.linear(hidden, weight, bias) / 5)
        cost = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum")
        squares = z.logsumexp(-1).square()[targets != IGNORE].sum()
        for with_z in (False, True):
            x = hidden.detach().clone().requires_grad_()
            mine = [t.detach()[start:stop].clone().requires_grad_() for t in (weight, bias)]
            head = Head(mine[0], mine[1], 5.0, 0.7)
            with Tracer() as tracer:
                if with_z:
                    found, further = vocabulary_parallel_token_sums(x, head, targets, VOCABULARY, chunk=5)
                    total, wanted = 1.5 * found + 0.2 * further, 1.5 * cost + 0.2 * squares
                    assert abs(float(further - squares)) <= 1e-12 * float(squares) + 1e-12
                else:
                    found = vocabulary_parallel_loss(x, head, targets, VOCABULARY, chunk=5)
                    total, wanted = 1.5 * found, 1.5 * cost
                total.backward()
            assert abs(float(found - cost)) <= 1e-12 * float(cost) + 1e-12
            slopes = torch.autograd.grad(wanted, (hidden, weight, bias), retain_graph=True)
            for ours, theirs in zip((x, *mine), (slopes[0], *(s[start:stop] for s in slopes[1:])), strict=True):
                assert (ours.grad - theirs).abs().max() <= 1e-11
            count = int((targets != IGNORE).sum())
            assert tracer.bytes() == {"all_reduce": (3 * count + hidden.numel()) * 8}
    with pytest.raises(IndexError, match=f"target of {VOCABULARY}"):
        vocabulary_parallel_loss(hidden, head, torch.full((3, 7), VOCABULARY), VOCABULARY)
    with pytest.raises(HanlinError, match="its head has"):
        vocabulary_parallel_loss(hidden, Head(weight), targets, VOCABULARY)


def shared_tokens_send(rank: int, ranks: int, folder: Path) -> None:
    """Bytes of one pass with sequence parallelism are those of the docstrings, fp64."""
    laid = MODELS["llama"]()
    model, batch = shard(laid.model(), sequence=True), batch_of(0, 13)
    with Tracer() as tracer:
        CausalLM().loss(model, batch)[0][0][0].backward()
    b, depth = 8, len(laid.layers)
    S = len(batch.ids) * ranks * 7 * WIDTH * b  # 13 tokens: 7 and 6
    trained = int((batch.targets != IGNORE).sum())
    assert tracer.bytes() == {
        "all_gather": (2 + 2) * depth * S + S + S,  # blocks; the embedding backward; the last hidden states
        "reduce_scatter": (2 + 2) * depth * S + S,  # blocks; the embedding
        "all_reduce": (2 * depth + 1) * WIDTH * b + 3 * trained * b + len(batch.ids) * 13 * WIDTH * b,
    }


def noise_is_refused(rank: int, ranks: int, folder: Path) -> None:
    model = shard(MODELS["experts"]().model())
    router = model.model.layers[0].mlp.router
    object.__setattr__(router.config, "jitter", 0.1)
    ids = batch_of(0, 8).ids
    assert model.eval()(ids).logits.isfinite().all()
    with pytest.raises(HanlinError, match=r"jitter is 0\.1"):
        model.train()(ids)
    assert EXPERTS.router.jitter == 0.1  # the config is the model's own
    object.__setattr__(router.config, "jitter", 0.0)


CHECKS = {f.__name__: f for f in (any_tokens_travel, split_and_gathered, cut_and_joined, recomputed, low_precision,
                                  loss_over_columns, shared_tokens_send, noise_is_refused)}  # fmt: skip


def check(rank: int, ranks: int, folder: str) -> None:
    """Run all checks in one of `ranks` processes; what failed is written to `folder`/NAME-rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for name, each in CHECKS.items():
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{name}", rank=rank, world_size=ranks)
        told = ""
        try:
            each(rank, ranks, Path(folder))
        except Exception:
            told = traceback.format_exc()
        Path(folder, f"{name}-{rank}").write_text(told, encoding="utf-8")
        dist.destroy_process_group()
