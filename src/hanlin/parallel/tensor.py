"""Tensor parallelism: every rank holds its share of each matrix and computes its share of each layer (Megatron-LM,
arXiv:1909.08053).

    x ──┬─▶ rank 0: its heads ──▶ its columns of W_o ──▶ partial y ──┐
        │                                                            (+) ──▶ y     one sum over the ranks for attention,
        └─▶ rank 1: its heads ──▶ its columns of W_o ──▶ partial y ──┘             one for the feed-forward of a layer

`models.tensor_plan` says which tensor is cut how. `shard` cuts a loaded model in place and hangs the collectives on its
modules, so that `model(ids)` on every rank gives every rank the same whole logits. It works over any process group
(gloo, nccl), before `nn.frozen.freeze`, and with gradients: `gather` puts weights or gradients together again.
"""

import os
from collections.abc import Callable
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
from hanlin.models.tensor_plan import PLAN, Block, Cut, Layout, Once, Part, Partial, share
from hanlin.models.transformer import Transformer
from hanlin.nn.attention import Attention
from hanlin.nn.linear import Linear, PackedLinear
from hanlin.nn.position_bias import Alibi
from hanlin.nn.routing import Routing
from hanlin.parallel.collectives import Group, all_sum, copy_in, gather_columns, gather_out, place, sum_out
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
def shard(model: Transformer, group: Group = None) -> Transformer:
    """Leave this rank's share of a model in it, in place; every rank calls this with the same whole model.

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
    for name, module in list(model.named_modules()):
        if (block := PLAN.get(type(module))) is not None:
            prefix = f"{name}." if name else ""
            found = _cut_block(module, block, rank, ranks, done, group)
            layouts |= {prefix + inner: layout for inner, layout in found.items()}
            _hang_collectives(module, block, ranks, model.config.vocab_size, group)
    start, _ = share(model.config.vocab_size, rank, ranks)
    model.model.embed_tokens = VocabularyEmbedding(model.model.embed_tokens.weight, start, group)
    model.part = Part(rank, ranks, layouts)
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
            parameter.data = _take(parameter.data, layout, units, rank, ranks)
            if units < ranks:
                _on_gradient(parameter, _sum_over_sharers(share(units, rank, ranks)[0], units, group))
        elif isinstance(layout, Partial):
            _on_gradient(parameter, lambda gradient: all_sum(gradient.clone(), group))
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


def _take(whole: Tensor, cut: Cut, units: int, rank: int, ranks: int) -> Tensor:
    """A rank's share, in memory of its own."""
    start, stop = share(units, rank, ranks)
    pieces = whole.unflatten(cut.dim, (cut.pieces, units, -1)).narrow(cut.dim + 1, start, stop - start)
    return pieces.flatten(cut.dim, cut.dim + 2).clone(memory_format=torch.contiguous_format)


def _gather_one(tensor: Tensor | None, layout: Layout, units: int, part: Part, group: Group) -> Tensor | None:
    if isinstance(layout, Once):
        return _from_first(tensor, group)
    if not isinstance(layout, Cut) or tensor is None:
        return tensor
    shares = [share(units, rank, part.ranks) for rank in range(part.ranks)]
    start, stop = shares[part.rank]
    last = tensor.unflatten(layout.dim, (layout.pieces, stop - start, -1)).movedim(layout.dim + 1, -1)
    columns = gather_columns(last, [stop - start for start, stop in shares], group)
    ends = torch.tensor([stop - start for start, stop in shares]).cumsum(0).tolist()
    first = dict(zip(reversed(shares), reversed(ends), strict=True))  # of those that share it
    kept = [columns[..., end - (stop - start) : end] for (start, stop), end in sorted(first.items())]
    return torch.cat(kept, -1).movedim(-1, layout.dim + 1).flatten(layout.dim, layout.dim + 2).contiguous()


def _from_first(tensor: Tensor | None, group: Group) -> Tensor | None:
    """Rank 0's tensor, everywhere."""
    box: list[Any] = [tensor]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def _on_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor]) -> None:
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)  # or the hook is refused; it stays if the parameter is trained later
    parameter.register_hook(hook)
    parameter.requires_grad_(wanted)


def _sum_over_sharers(unit: int, units: int, group: Group) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:  # by a collective of all ranks, so that no further groups are needed
        slots = gradient.new_zeros(units, *gradient.shape)
        slots[unit] = gradient
        return all_sum(slots, group)[unit]

    return hook


def _hang_collectives(module: nn.Module, block: Block, ranks: int, vocabulary: int, group: Group) -> None:
    """Where values cross between whole and cut."""

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_copied(value, group) for value in arguments)

    def leave_whole(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return copy_in(out, group)

    def leave_sum(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return sum_out(out, group)

    def leave_columns(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return gather_out(out, sizes, group)

    shares = [share(vocabulary, rank, ranks) for rank in range(ranks)]
    sizes = [stop - start for start, stop in shares]
    for names, hook in ((block.outputs, leave_whole), (block.sums, leave_sum), (block.gathers, leave_columns)):
        for child in _children(module, names):
            child.register_forward_hook(hook)
    for child in _children(module, block.inputs):
        child.register_forward_pre_hook(enter)


def _children(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Those of the named children that this block has."""
    found = [module.get_submodule(name) if not name else getattr(module, name, None) for name in names]
    return [child for child in found if child is not None]


def _copied(value: Any, group: Group) -> Any:
    """Floating-point tensors and router's weights through `copy_in`; anything else carries no gradient here."""
    if isinstance(value, Routing):
        return replace(value, weights=copy_in(value.weights, group))
    return copy_in(value, group) if isinstance(value, Tensor) and value.is_floating_point() else value
