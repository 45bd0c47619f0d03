"""How a model is cut for tensor parallelism (Megatron-LM, arXiv:1909.08053, section 3), as data: one row a block.

    y = down( f(up(x)) )      up cut by rows, down by columns: rank r computes its own hidden units from end to end, and
                              the ranks' y are partial sums of the whole y

Attention is the same with heads in the place of hidden units. What the table does not name is whole on every rank, and
so are the values that flow between blocks. `parallel.tensor` reads this file; the model does not know it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from hanlin.models.layer import Layer, Stack
from hanlin.models.transformer import Transformer
from hanlin.nn.attention import Attention, CrossAttention
from hanlin.nn.experts import Experts, MixtureOfExperts
from hanlin.nn.feed_forward import FeedForward
from hanlin.nn.latent_attention import LatentAttention
from hanlin.nn.multi_token import Step
from hanlin.nn.position_bias import RelativeBias

Unit = Literal["heads", "kv_heads", "hidden", "vocabulary"]
ITSELF = ""  # in the place of a child's name


@dataclass(frozen=True)
class Cut:
    """Each rank keeps its share of the `unit`s along dimension `dim`. pieces: equal tensors that stand one behind the
    other along it, each cut by itself (gate and up in one matrix). Fewer units than ranks: several ranks keep the same
    one."""

    unit: Unit
    dim: int = 0
    pieces: int = 1


@dataclass(frozen=True)
class Once:
    """Rank 0 alone keeps it: the bias of a product whose outputs are summed over the ranks."""


@dataclass(frozen=True)
class Partial:
    """Whole on every rank, each of which sees a part of its gradient: a weight that acts on a rank's own heads."""


Layout = Cut | Once | Partial


@dataclass(frozen=True)
class Block:
    """tensors: pattern of a parameter's name in the block -> its layout; what matches none is whole, and so is its
    gradient.

    Where a value crosses between whole and cut, by the names of children (`ITSELF`: of the block):
    inputs: what goes in is read by every rank's share; outputs: what comes out is. Both: the gradient is summed.
    sums: what comes out is a partial sum. gathers: what comes out is cut along its last dimension.
    """

    tensors: Mapping[str, Layout]
    inputs: tuple[str, ...] = (ITSELF,)
    outputs: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()


HEADS, KV_HEADS, HIDDEN, VOCABULARY = Cut("heads"), Cut("kv_heads"), Cut("hidden"), Cut("vocabulary")
HEADS_IN, HIDDEN_IN = Cut("heads", dim=1), Cut("hidden", dim=1)

PLAN: dict[type[nn.Module], Block] = {
    Attention: Block(
        {
            "q_proj.*": HEADS,
            "k_proj.*": KV_HEADS,
            "v_proj.*": KV_HEADS,
            "sinks": HEADS,
            "[qk]_norm.*": Partial(),
            "o_proj.weight": HEADS_IN,
            "o_proj.bias": Once(),
        },
        sums=("o_proj",),
    ),
    CrossAttention: Block(
        {
            "q_proj.*": HEADS,
            "k_proj.*": KV_HEADS,
            "v_proj.*": KV_HEADS,
            "o_proj.weight": HEADS_IN,
            "o_proj.bias": Once(),
        },
        sums=("o_proj",),
    ),
    LatentAttention: Block(  # the latents are whole, so that every rank's cache holds the same; heads begin behind them
        {
            "q_proj.*": HEADS,
            "q_b_proj.*": HEADS,
            "kv_a_layernorm.*": Partial(),
            "kv_b_proj.*": HEADS,
            "o_proj.weight": HEADS_IN,
            "o_proj.bias": Once(),
        },
        inputs=("q_proj", "q_b_proj"),
        outputs=("kv_a_proj_with_mqa",),
        sums=("o_proj",),
    ),
    FeedForward: Block(
        {
            "gate_proj.*": HIDDEN,
            "up_proj.*": HIDDEN,
            "down_proj.weight": HIDDEN_IN,
            "down_proj.bias": Once(),
        },
        sums=("down_proj",),
    ),
    Experts: Block(  # the router is whole: every rank sends a token to the same experts
        {
            "gate_up_proj": Cut("hidden", dim=1, pieces=2),
            "gate_up_proj_bias": Cut("hidden", dim=1, pieces=2),
            "up_proj": Cut("hidden", dim=1),
            "up_proj_bias": Cut("hidden", dim=1),
            "down_proj": Cut("hidden", dim=2),
            "down_proj_bias": Once(),
        },
        sums=(ITSELF,),
    ),
    RelativeBias: Block({"embedding.weight": HEADS_IN}, inputs=()),
    Transformer: Block(
        {"model.embed_tokens.weight": VOCABULARY, "lm_head.*": VOCABULARY}, inputs=("lm_head",), gathers=("lm_head",)
    ),
}


@dataclass(frozen=True)
class Tokens:
    """What sequence parallelism (arXiv:2205.05198) changes in a block, by names of children. Between the blocks of a
    layer each rank has its own tokens; what goes into one is gathered, its partial sums are scattered (`Block.sums`).

    gathers: the first input becomes all tokens, which every rank's share reads; other inputs are as in `Block.inputs`.
    once: reads gathered tokens, and its gradient is the same on every rank: each gives that of its own tokens.
    inputs: in the place of `Block.inputs`; beside: the same for all inputs but the first.
    picks: what comes out for all tokens is cut to this rank's. cuts: so is the first input, which is whole (and has a
    whole gradient). joins: what comes out of this rank's tokens becomes that of all tokens, with a whole gradient.
    local: sees this rank's tokens only, and so do the gradients of its parameters: they are summed over the ranks.
    """

    gathers: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    picks: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()
    local: tuple[str, ...] = ()


SEQUENCE: dict[type[nn.Module], Tokens] = {
    Stack: Tokens(
        cuts=("embed_positions", "embed_segments"),
        local=("embed_positions", "embed_segments", "embed_norm", "norm"),
        joins=("norm",),
    ),
    Layer: Tokens(
        gathers=("self_attn", "cross_attn", "mlp"),
        local=(
            "input_layernorm",
            "post_attention_layernorm",
            "cross_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
    MixtureOfExperts: Tokens(once=("router",), picks=("shared_gate",), local=("shared_gate",)),
    Experts: Tokens(beside=(ITSELF,)),
    LatentAttention: Tokens(once=("q_a_proj", "kv_a_proj_with_mqa"), inputs=("q_b_proj",)),
    Step: Tokens(cuts=(ITSELF,), local=("enorm", "hnorm", "eh_proj", "norm"), joins=(ITSELF,)),
    Transformer: Tokens(inputs=("lm_head",)),
}


@dataclass(frozen=True)
class Part:
    """What a rank holds of a model (`Transformer.part`). layouts: parameter's name -> its layout and how many units the
    whole has (0: not cut). group: the ranks' process group, None: all. tokens: with sequence parallelism, which tokens
    are here between the blocks (`parallel.sequence.TokenShares`). summed: parameters whose gradient the ranks sum."""

    rank: int
    ranks: int
    layouts: Mapping[str, tuple[Layout, int]] = field(default_factory=dict)
    group: Any = None
    tokens: Any = None
    summed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Piece:
    """Where what a rank holds sits in the whole tensor: dimension `dim` is `pieces` equal tensors one behind the other,
    of each of which the rank has units [start, stop) of `units`."""

    dim: int
    pieces: int
    units: int
    rank: int
    ranks: int

    @property
    def start(self) -> int:
        return share(self.units, self.rank, self.ranks)[0]

    @property
    def stop(self) -> int:
        return share(self.units, self.rank, self.ranks)[1]


def share(units: int, rank: int, ranks: int) -> tuple[int, int]:
    """Which units are a rank's: [start, stop). As equal as can be; fewer units than ranks: each rank one, the ranks
    that share it side by side."""
    start = rank * units // ranks
    return start, max(start + 1, (rank + 1) * units // ranks)
