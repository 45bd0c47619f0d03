"""Where values cross between what is whole, what is cut, and what each rank has its own tokens of: the collectives of
`models.tensor_plan`, hung on the modules of a model as hooks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.models.layer import Layer, Stack
from hanlin.models.tensor_plan import SEQUENCE, Block, Tokens, share
from hanlin.nn.routing import Router, Routing
from hanlin.parallel.collectives import Group, all_sum, copy_in, gather_out, sum_out
from hanlin.parallel.sequence import TokenShares


def hang_collectives(
    module: nn.Module, block: Block, ranks: int, vocabulary: int, group: Group, tokens: TokenShares | None
) -> None:
    """Those of a block of the plan. tokens: with sequence parallelism."""

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_copied(value, group) for value in arguments)

    def enter_beside(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[0], *(_copied(value, group) for value in arguments[1:])

    def leave_whole(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return copy_in(out, group)

    def leave_sum(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return sum_out(out, group) if tokens is None else tokens.scatter(out)

    def leave_columns(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return gather_out(out, sizes, group)

    shares = [share(vocabulary, rank, ranks) for rank in range(ranks)]
    sizes = [stop - start for start, stop in shares]
    changed = SEQUENCE.get(type(module), Tokens())
    inputs, beside = (block.inputs, ()) if tokens is None else (changed.inputs, changed.beside)
    for names, hook in ((block.outputs, leave_whole), (block.sums, leave_sum), (block.gathers, leave_columns)):
        for child in _children(module, names):
            child.register_forward_hook(hook)
    for names, hook in ((inputs, enter), (beside, enter_beside)):
        for child in _children(module, names):
            child.register_forward_pre_hook(hook)


def hang_tokens(model: nn.Module, group: Group, tokens: TokenShares) -> set[str]:
    """What sequence parallelism adds everywhere in a model; the names of the parameters that see a rank's own tokens
    only, whose gradients are summed from now on."""
    local: set[int] = set()
    for module in list(model.modules()):
        if isinstance(module, Stack) and module.norm is None:
            module.norm = nn.Identity()  # where the last hidden states become whole
        if isinstance(module, Layer):
            module.register_forward_pre_hook(_tell_length(tokens))
        row = SEQUENCE.get(type(module))
        if row is not None:
            _hang_row(module, row, group, tokens)
            local |= {id(p) for child in _children(module, row.local) for p in child.parameters()}
    found = {name: p for name, p in model.named_parameters() if id(p) in local}
    for parameter in found.values():
        on_gradient(parameter, lambda gradient: all_sum(gradient.clone(), group))
    return set(found)


def refuse_noise(router: nn.Module, _: Any) -> None:
    """Ranks that draw their own noise would send a token to different experts."""
    if isinstance(router, Router) and router.config.jitter and router.training:
        raise HanlinError(
            f"This router's jitter is {router.config.jitter}: in training every rank of parallel.tensor would draw its "
            "own. Set it to 0, or parallel.tensor to 1."
        )


def on_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor]) -> None:
    """`hook` gets the gradient of each backward before it is added to `.grad`."""
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)  # or the hook is refused; it stays if the parameter is trained later
    parameter.register_hook(hook)
    parameter.requires_grad_(wanted)


def _hang_row(module: nn.Module, row: Tokens, group: Group, tokens: TokenShares) -> None:
    def gather(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tokens.gather(arguments[0]), *(_copied(value, group) for value in arguments[1:])

    def once(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tokens.once(arguments[0]), *arguments[1:]

    def cut(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        first = arguments[0]
        return tokens.share(first) if first.is_floating_point() else tokens.places(first), *arguments[1:]

    def pick(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return tokens.pick(out)

    def join(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return tokens.whole(out)

    for names, before in ((row.gathers, gather), (row.once, once), (row.cuts, cut)):
        for child in _children(module, names):
            child.register_forward_pre_hook(before)
    for names, after in ((row.picks, pick), (row.joins, join)):
        for child in _children(module, names):
            child.register_forward_hook(after)


def _tell_length(tokens: TokenShares) -> Callable[..., None]:
    def tell(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        shared = arguments[1]
        if shared.cache is not None and shared.cache.source is not None:
            raise HanlinError(
                "parallel.sequence does not read an encoder's output from a cache: cut this model without `sequence` "
                "to write text with it."
            )
        tokens.length = shared.length

    return tell


def _children(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Those of the named children that this block has."""
    found = [module.get_submodule(name) if not name else getattr(module, name, None) for name in names]
    return [child for child in found if child is not None]


def _copied(value: Any, group: Group) -> Any:
    """Floating-point tensors and router's weights through `copy_in`; anything else carries no gradient here."""
    if isinstance(value, Routing):
        return replace(value, weights=copy_in(value.weights, group))
    return copy_in(value, group) if isinstance(value, Tensor) and value.is_floating_point() else value
