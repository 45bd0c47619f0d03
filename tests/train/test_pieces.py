"""Optimisers over flat shares of parameters: what the ranks do together is what one process does.

The ranks are simulated in one process: each steps on its own share, and an exchange that holds all of them puts the
updates of one name together.
"""

import pytest
import torch
from tiny_training import tiny_model

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ExpertsConfig, ModelConfig
from hanlin.models.tensor_plan import Cut, Part
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import RouterConfig
from hanlin.train.choices import SGD, Adafactor, AdamW, Muon
from hanlin.train.eight_bit import BLOCK
from hanlin.train.optim import build_optimizer, group_parameters, parameter_kinds


def shares_of(model, ranks, *, unit=1):
    """{name: flat share} of each rank, cut where ZeRO would: not at the ends of rows. Empty shares are left out."""
    found = [{} for _ in range(ranks)]
    for name, p in model.named_parameters():
        length = -(-p.numel() // (ranks * unit)) * unit
        for rank in range(ranks):
            piece = p.detach().reshape(-1)[rank * length : (rank + 1) * length].clone()
            if piece.numel():
                found[rank][name] = torch.nn.Parameter(piece)
    return found


class Together:
    """Both sides of the exchange among simulated ranks, in two passes: in the first each rank's update is written down,
    in the second it gets the whole."""

    def __init__(self, model, rank, ranks, board):
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.rank, self.ranks, self.board = rank, ranks, board
        self.order = []

    def whole(self, name, piece):
        self.order.append(name)
        self.board.setdefault(name, {})[self.rank] = piece.clone()
        parts = self.board[name]
        flat = torch.cat([parts[r] for r in sorted(parts)])
        full = torch.zeros(self.shapes[name].numel(), dtype=piece.dtype)
        full[: len(flat)] = flat
        return full.view(self.shapes[name])

    def own(self, name, matrix):
        parts = self.board[name]
        start = sum(len(parts[r]) for r in sorted(parts) if r < self.rank)
        return matrix.reshape(-1)[start : start + len(parts[self.rank])]


def set_gradients(model, shares, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        start = 0
        for share in shares:
            if name in share:
                stop = start + share[name].numel()
                share[name].grad = p.grad.reshape(-1)[start:stop].clone()
                start = stop


def assert_joined(model, shares, tolerance):
    for name, p in model.named_parameters():
        joined = torch.cat([share[name].detach() for share in shares if name in share]).view(p.shape)
        torch.testing.assert_close(joined, p.detach(), rtol=0, atol=tolerance, msg=name)


def moe_model():
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "gpt_oss", depth=2, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, qkv_bias=True),
        feed_forward=ExpertsConfig(24, 4, RouterConfig(2, bias=True), bias=True), vocab_size=61, width=32,
    )  # fmt: skip
    return Transformer(config)


@pytest.mark.parametrize(
    "choice",
    [
        AdamW(embedding_lr_ratio=0.3, decay_embeddings=True),
        SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
        AdamW(state_bits=8),
    ],
    ids=["adamw", "sgd", "adamw-8"],
)
def test_elementwise_optimisers_on_shares_are_those_on_the_whole(choice):
    """Bit for bit in fp64; in 8 bits, where the shares end with a block, too."""
    model = tiny_model().double()
    whole, eight = build_optimizer(model, choice, 0.01), choice == AdamW(state_bits=8)
    shares = shares_of(model, 3, unit=BLOCK if eight else 1)
    optimizers = [build_optimizer(model, choice, 0.01, pieces=share) for share in shares]
    for step in range(5):
        set_gradients(model, shares, step)
        whole.step(0.7)
        for optimizer in optimizers:
            optimizer.step(0.7)
    assert_joined(model, shares, 0 if eight else 1e-15)


@pytest.mark.parametrize("make", [tiny_model, moe_model])
@pytest.mark.parametrize("bits", [32, 8])
def test_muon_on_shares_with_an_exchange_is_muon_on_the_whole(make, bits):
    """fp64, 1e-12; every rank asks for the same names in the same order, also for those it has no share of."""
    model = make().double()
    choice = Muon(weight_decay=0.1, state_bits=bits)
    whole = build_optimizer(model, choice, 0.02)
    ranks = 5
    shares = shares_of(model, ranks, unit=BLOCK)  # many a rank has no share of a small matrix
    assert len({len(share) for share in shares}) > 1
    kinds = parameter_kinds(model)
    for step in range(3):
        set_gradients(model, shares, step)
        board, orders = {}, []
        if step == 0:
            exchanges = [Together(model, rank, ranks, board) for rank in range(ranks)]
            optimizers = [
                build_optimizer(model, choice, 0.02, pieces=share, kinds=kinds, exchange=exchange)
                for share, exchange in zip(shares, exchanges, strict=True)
            ]
        for exchange in exchanges:
            exchange.board, exchange.order = board, []
        whole.step(1.0)
        weights = [{n: p.detach().clone() for n, p in share.items()} for share in shares]
        states = [{n: t.clone() for n, t in o.state().items()} for o in optimizers]
        for optimizer in optimizers:  # first pass: what everyone gives
            optimizer.step(1.0)
        for share, before, optimizer, state in zip(shares, weights, optimizers, states, strict=True):
            for name, p in share.items():
                p.data.copy_(before[name])
            optimizer.load(state)
        for optimizer, exchange in zip(optimizers, exchanges, strict=True):
            exchange.order = []
            optimizer.step(1.0)
            orders.append(exchange.order)
        assert all(order == orders[0] for order in orders) and len(orders[0]) == len(group_parameters(model).matrices)
        assert_joined(model, shares, 1e-12)


def test_states_of_shares_carry_the_names_of_the_parameters():
    model = tiny_model()
    (share, *_) = shares_of(model, 2)
    set_gradients(model, [share], 0)
    optimizer = build_optimizer(model, AdamW(state_bits=8), 0.01, pieces=share)
    optimizer.step(1.0)
    state = optimizer.state()
    assert {path.rpartition("/")[0] for path in state} == set(share)
    matrix = "model.layers.0.self_attn.q_proj.weight"
    assert {path.rpartition("/")[2] for path in state if path.startswith(matrix)} == {
        "step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"
    }  # fmt: skip
    other = build_optimizer(model, AdamW(state_bits=8), 0.01, pieces=share)
    other.load(state)
    assert all(torch.equal(t, state[path]) for path, t in other.state().items())


def test_kinds_know_stacks_of_experts_from_biases():
    kinds = parameter_kinds(moe_model())
    layer = "model.layers.0."
    assert kinds[layer + "mlp.experts.gate_up_proj"] == kinds[layer + "mlp.router.weight"] == "matrices"
    assert kinds[layer + "mlp.experts.gate_up_proj_bias"] == kinds[layer + "mlp.router.bias"] == "vectors"
    assert kinds[layer + "self_attn.q_proj.bias"] == "vectors" and kinds["model.embed_tokens.weight"] == "embeddings"


def test_muon_treats_a_stack_of_experts_matrix_by_matrix():
    torch.manual_seed(0)
    from hanlin.train.muon import Muon as Optimiser

    stack = torch.nn.Parameter(torch.randn(3, 8, 12))
    singles = [torch.nn.Parameter(m.clone()) for m in stack.detach()]
    for step in range(3):
        stack.grad = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(step))
        for single, grad in zip(singles, stack.grad, strict=True):
            single.grad = grad.clone()
        if step == 0:
            one, other = Optimiser([stack], lr=0.1), Optimiser(singles, lr=0.1)
        one.step(), other.step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]), rtol=0, atol=1e-6)


def test_what_needs_whole_matrices_refuses_shares_by_name():
    model = tiny_model()
    share, _ = shares_of(model, 2)
    for choice in (Muon(), Adafactor()):
        with pytest.raises(HanlinError, match=rf"{choice.kind} needs whole matrices, but model\..*shared among ranks"):
            build_optimizer(model, choice, 0.01, pieces=share)
        build_optimizer(model, choice, 0.01, pieces=dict(model.named_parameters()))  # data parallel: themselves
    name = "model.layers.1.mlp.down_proj.weight"
    model.part = Part(0, 2, {name: (Cut("hidden", dim=1), 48)})
    for choice in (Muon(), Adafactor()):
        with pytest.raises(HanlinError, match=r"down_proj.weight is cut over the ranks of parallel\.tensor"):
            build_optimizer(model, choice, 0.01)
    build_optimizer(model, AdamW(), 0.01)


def test_a_share_without_a_gradient_is_refused_where_ranks_exchange():
    model = tiny_model()
    share, _ = shares_of(model, 2)
    optimizer = build_optimizer(model, Muon(), 0.01, pieces=share, exchange=Together(model, 0, 2, {}))
    with pytest.raises(HanlinError, match=r"q_proj.weight has no gradient on this rank"):
        optimizer.step(1.0)
