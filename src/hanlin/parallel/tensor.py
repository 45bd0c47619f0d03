"""Tensor parallelism: every rank holds its share of each matrix and computes its share of each layer (Megatron-LM,
arXiv:1909.08053).

    x ──┬─▶ rank 0: its heads ──▶ its columns of W_o ──▶ partial y ──┐
        │                                                            (+) ──▶ y     one sum over the ranks for attention,
        └─▶ rank 1: its heads ──▶ its columns of W_o ──▶ partial y ──┘             one for the feed-forward of a layer

Bytes a rank gives in one pass over `rows` rows of T tokens, all in all-reduces, S = rows * T * width * b with b bytes
an activation; `parallel.sequence` and `parallel.vocabulary` have their own:

    forward     S for attention, S for a feed-forward or experts, S for a shared expert, S for cross-attention; the
                embedding S in its weights' dtype
    backward    as many S for the blocks' inputs (cross-attention: its source besides), k numbers a token for the
                router's weights (fp32, fp64 for fp64); latent attention has in the place of its S the input of its
                query heads and the latent. In the weights' dtype: gradients of query, key and latent norms; those of
                key heads that ranks share, one slot for each key head of the layer

`models.tensor_plan` says which tensor is cut how. `shard` cuts a loaded model in place and hangs the collectives on its
modules, so that `model(ids)` on every rank gives every rank the same whole logits. It works over any process group
(gloo, nccl), before `nn.frozen.freeze`, and with gradients: `gather` puts weights or gradients together again.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hanlin.core.device import choose_device
from hanlin.core.errors import HanlinError
from hanlin.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    Mixer,
    ModelConfig,
)
from hanlin.models.folder import load_model
from hanlin.models.tensor_plan import PLAN, Block, Cut, Layout, Once, Part, Partial, Piece, share
from hanlin.models.transformer import Transformer
from hanlin.nn.attention import Attention
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.nn.position_bias import Alibi
from hanlin.nn.routing import Router
from hanlin.parallel.collectives import Group, all_sum, gather_columns, place
from hanlin.parallel.crossing import hang_collectives, hang_tokens, on_gradient, refuse_noise
from hanlin.parallel.sequence import TokenShares
from hanlin.parallel.vocabulary import VocabularyEmbedding


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """What one of `ranks` ranks holds: its heads, key heads and hidden units; a cache made from it fits the rank. The
    vocabulary is the whole one, since logits are gathered.

    `HanlinError` with the layer's name for what cannot be cut into equal shares, or is not supported.
    """
    if config.vocab_size < ranks:
        raise HanlinError(f"A vocabulary of {config.vocab_size} tokens cannot be cut over {ranks} ranks.")

    def cut(layers: tuple[LayerConfig, ...], where: str) -> tuple[LayerConfig, ...]:
        return tuple(_local_layer(layer, ranks, f"{where} {index}") for index, layer in enumerate(layers))

    return replace(config, layers=cut(config.layers, "Layer"), encoder=cut(config.encoder, "Encoder layer"))


@torch.no_grad()
def shard(model: Transformer, group: Group = None, *, sequence: bool = False) -> Transformer:
    """Leave this rank's share of a model in it, in place; every rank calls this with the same whole model.

    sequence: between the cut blocks each rank has its own tokens (`parallel.sequence`); what the model takes and gives
    stays whole.

    The cut weights are copies of their own, so the memory of the rest is given back. `model.config` stays the whole
    model's (`local_config` is what a cache is made from), `model.part` says what is here. Row-parallel biases stay on
    rank 0, everything that is not cut stays everywhere. A part has no `state_dict` and cannot be saved: nobody could
    read it as a model.
    """
    rank, ranks = place(group)
    _check_whole(model)
    local_config(model.config, ranks)
    if ranks == 1:
        return model
    layouts: dict[str, tuple[Layout, int]] = {}
    done: set[int] = set()  # ids of what several modules share
    tokens = TokenShares(group) if sequence else None
    for name, module in list(model.named_modules()):
        if (block := PLAN.get(type(module))) is not None:
            prefix = f"{name}." if name else ""
            found = _cut_block(module, block, rank, ranks, done, group)
            layouts |= {prefix + inner: layout for inner, layout in found.items()}
            hang_collectives(module, block, ranks, model.config.vocab_size, group, tokens)
        elif isinstance(module, Router):
            module.register_forward_pre_hook(refuse_noise)
    start, _ = share(model.config.vocab_size, rank, ranks)
    model.model.embed_tokens = VocabularyEmbedding(model.model.embed_tokens.weight, start, group, tokens)
    summed = {name for name, (layout, _) in layouts.items() if isinstance(layout, Partial)}
    if tokens is not None:
        summed |= hang_tokens(model, group, tokens)
    model.part = Part(rank, ranks, layouts, group, tokens, frozenset(summed))
    model.register_state_dict_pre_hook(_refuse_saving)
    return model


def load_sharded(
    path: str | os.PathLike[str],
    group: Group = None,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
) -> Transformer:
    """The share of this rank of the model in folder `path`, in evaluation mode, on `device`.

    Simple: each rank reads the whole model into host memory, cuts it, and gives the rest back; the peak is the whole
    model once for each rank of a machine.
    """
    model = load_model(path, dtype=dtype, device="cpu")
    return shard(model, group).to(choose_device(str(device)))


@torch.no_grad()
def gather(
    model: Transformer, group: Group = None, *, of: Callable[[nn.Parameter], Tensor | None] = lambda p: p.detach()
) -> dict[str, Tensor]:
    """Put a sharded model together: parameter's name -> the whole tensor, the same on every rank; all ranks call it.

    of: what is gathered of a parameter, `lambda p: p.grad` for gradients; None: nothing, on all ranks alike.
    """
    held = {name: of(parameter) for name, parameter in model.named_parameters()}
    if model.part is None:
        return {name: tensor for name, tensor in held.items() if tensor is not None}
    layouts = model.part.layouts
    names = sorted(held.keys() | (layouts.keys() if model.part.rank else set()))
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - held.keys()
    whole: dict[str, Tensor] = {}
    for name in names:
        if name in tied:
            continue
        layout, units = layouts.get(name, (Partial(), 0))
        tensor = _gather_one(held.get(name), layout, units, model.part, group)
        if tensor is not None:
            whole[name] = tensor
    return whole


def replicated(model: Transformer) -> set[str]:
    """Names of the parameters that every tensor rank holds whole, with the same gradient: of the ranks' gradients a
    global norm counts one. What some ranks share (`copies`) is not among them."""
    layouts = {} if model.part is None else model.part.layouts
    whole = (Partial(), 0)
    return {name for name, _ in model.named_parameters() if isinstance(layouts.get(name, whole)[0], Partial)}


def copies(model: Transformer) -> dict[str, int]:
    """How many ranks of the tensor group hold the same numbers of each parameter here, with the same gradient: all,
    one, or, where there are fewer key heads than ranks, those that share one. A global norm counts 1 / copies of each.
    """
    ranks, whole = (1, set()) if model.part is None else (model.part.ranks, replicated(model))
    found = {}
    for name, _ in model.named_parameters():
        layout, units = (Partial(), 0) if model.part is None else model.part.layouts.get(name, (Partial(), 0))
        shared = max(1, ranks // units) if isinstance(layout, Cut) else 1
        found[name] = ranks if name in whole else shared
    return found


def cut_of(model: Transformer, name: str) -> Piece | None:
    """Where what this rank holds of a parameter sits in the whole one; None: it is the whole one, here or (a bias of
    summed outputs) on rank 0 alone."""
    if model.part is None:
        return None
    layout, units = model.part.layouts.get(name, (Partial(), 0))
    return (
        Piece(layout.dim, layout.pieces, units, model.part.rank, model.part.ranks) if isinstance(layout, Cut) else None
    )


def cut_tensor(whole: Tensor, layout: Cut | Piece, units: int, rank: int, ranks: int) -> Tensor:
    """A rank's share of a whole tensor, in memory of its own."""
    start, stop = share(units, rank, ranks)
    pieces = whole.unflatten(layout.dim, (layout.pieces, units, -1)).narrow(layout.dim + 1, start, stop - start)
    return pieces.flatten(layout.dim, layout.dim + 2).clone(memory_format=torch.contiguous_format)


def join_tensors(parts: Sequence[Tensor], layout: Cut | Piece, units: int) -> Tensor:
    """The whole of the shares of all ranks, in their order; of ranks that share a unit the first counts."""
    kept: dict[tuple[int, int], Tensor] = {}
    for rank, part in enumerate(parts):
        start, stop = share(units, rank, len(parts))
        kept.setdefault((start, stop), part.unflatten(layout.dim, (layout.pieces, stop - start, -1)))
    whole = torch.cat([kept[where] for where in sorted(kept)], layout.dim + 1)
    return whole.flatten(layout.dim, layout.dim + 2).contiguous()


def _refuse_saving(model: nn.Module, *_: Any) -> None:
    if isinstance(model, Transformer) and model.part is not None:
        raise HanlinError(
            f"This is part {model.part.rank} of a model that is cut over {model.part.ranks} ranks; it cannot be saved. "
            "`parallel.gather` puts the whole weights together."
        )


def _check_whole(model: Transformer) -> None:
    if model.part is not None:
        raise HanlinError(f"This model is cut already: it is part {model.part.rank} of {model.part.ranks}.")
    if any(getattr(module, "product", None) is not None for module in model.modules()):
        raise HanlinError("A frozen model has no plain weights to cut: `shard` it first, then `freeze` it.")
    if any(isinstance(module, Linear) and module.branch is not None for module in model.modules()):
        raise HanlinError("This model has an adapter; merge it or remove it before the model is cut over ranks.")


def _local_layer(layer: LayerConfig, ranks: int, where: str) -> LayerConfig:
    cross = layer.cross_attention
    return replace(
        layer,
        attention=_local_mixer(layer.attention, ranks, where),
        feed_forward=_local_feed_forward(layer.feed_forward, ranks, where),
        cross_attention=None if cross is None else _local_attention(cross, ranks, f"{where}, cross-attention"),
    )


def _local_mixer(mixer: Mixer, ranks: int, where: str) -> Mixer:
    if isinstance(mixer, AttentionConfig):
        return _local_attention(mixer, ranks, where)
    if isinstance(mixer, LatentAttentionConfig):
        return replace(mixer, heads=_equal_share(mixer.heads, ranks, f"{where}: {mixer.heads} heads"))
    raise HanlinError(f"{where}: tensor parallelism does not know {type(mixer).__name__.removesuffix('Config')}.")


def _local_attention(a: AttentionConfig, ranks: int, where: str) -> AttentionConfig:
    heads = _equal_share(a.heads, ranks, f"{where}: {a.heads} heads")
    if ranks > a.kv_heads and ranks % a.kv_heads == 0:
        return replace(a, heads=heads, kv_heads=1)  # several ranks keep the same key head
    return replace(a, heads=heads, kv_heads=_equal_share(a.kv_heads, ranks, f"{where}: {a.kv_heads} key/value heads"))


def _local_feed_forward(f: FeedForwardConfig | ExpertsConfig, ranks: int, where: str) -> Any:
    hidden = _equal_share(f.hidden, ranks, f"{where}: {f.hidden} hidden units")
    if isinstance(f, FeedForwardConfig):
        return replace(f, hidden=hidden)
    shared = _equal_share(f.shared_hidden, ranks, f"{where}: {f.shared_hidden} hidden units of the shared expert")
    return replace(f, hidden=hidden, shared_hidden=shared)


def _equal_share(count: int, ranks: int, what: str) -> int:
    if count % ranks:
        fitting = [n for n in range(2, count + 1) if count % n == 0]
        raise HanlinError(f"{what} cannot be shared equally by {ranks} ranks; they can by {_listed(fitting)}.")
    return count // ranks


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (" …" if len(numbers) > 6 else "")


def _cut_block(
    module: nn.Module, block: Block, rank: int, ranks: int, done: set[int], group: Group
) -> dict[str, tuple[Layout, int]]:
    """Cut the parameters of one block; what was laid out how."""
    found: dict[str, tuple[Layout, int]] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        layout = next((layout for pattern, layout in block.tensors.items() if fnmatchcase(name, pattern)), None)
        if layout is None:
            continue
        owner, _, kind = name.rpartition(".")
        holder = module.get_submodule(owner)
        units = _units(module, parameter, layout) if isinstance(layout, Cut) else 0
        if isinstance(layout, Cut) and id(parameter) not in done:
            parameter.data = cut_tensor(parameter.data, layout, units, rank, ranks)
            if units < ranks:
                on_gradient(parameter, _sum_over_sharers(share(units, rank, ranks)[0], units, group))
        elif isinstance(layout, Partial):
            on_gradient(parameter, lambda gradient: all_sum(gradient.clone(), group))
        elif isinstance(layout, Once) and rank:
            setattr(holder, kind, None)
        done.add(id(parameter))
        if isinstance(holder, nn.Linear):
            holder.out_features, holder.in_features = holder.weight.shape
        found[name] = layout, units
    for unit in ("heads", "kv_heads"):
        if isinstance(whole := getattr(module, unit, None), int):
            start, stop = share(whole, rank, ranks)
            setattr(module, unit, stop - start)
    if isinstance(module, Attention) and isinstance(alibi := module.scores.bias, Alibi) and id(alibi) not in done:
        done.add(id(alibi))
        alibi.slopes = alibi.slopes[slice(*share(alibi.heads, rank, ranks))].clone()
        alibi.heads = len(alibi.slopes)
    if isinstance(module, PackedLinear):
        module.pack()
    return found


def _units(module: nn.Module, tensor: Tensor, cut: Cut) -> int:
    """How many units the whole tensor has: the block's heads, else each row is one."""
    count = getattr(module, cut.unit, None)
    return count if isinstance(count, int) else tensor.shape[cut.dim] // cut.pieces


def _gather_one(tensor: Tensor | None, layout: Layout, units: int, part: Part, group: Group) -> Tensor | None:
    if isinstance(layout, Once):
        return _from_first(tensor, group)
    if not isinstance(layout, Cut) or tensor is None:
        return tensor
    sizes = [share(units, rank, part.ranks) for rank in range(part.ranks)]
    counts = [stop - start for start, stop in sizes]
    width = tensor.shape[layout.dim] // counts[part.rank]  # of one unit, in all pieces
    last = tensor.movedim(layout.dim, -1)
    parts = gather_columns(last, [count * width for count in counts], group).split([c * width for c in counts], -1)
    return join_tensors([found.movedim(-1, layout.dim) for found in parts], layout, units)


def _from_first(tensor: Tensor | None, group: Group) -> Tensor | None:
    """Rank 0's tensor, everywhere."""
    box: list[Any] = [tensor]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def _sum_over_sharers(unit: int, units: int, group: Group) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:  # by a collective of all ranks, so that no further groups are needed
        slots = gradient.new_zeros(units, *gradient.shape)
        slots[unit] = gradient
        return all_sum(slots, group)[unit]

    return hook
