"""Muon: momentum, orthogonalised (Jordan 2024, "Muon: an optimizer for hidden layers"; arXiv:2502.16982).

    m <- beta m + (1 - beta) g          u = (1 - beta) g + beta m  (Nesterov)   or   m
    W <- (1 - lr * decay) W - lr * sqrt(max(1, rows / cols)) * orthogonalise(u)

`orthogonalise` pushes every singular value towards 1 with a quintic Newton-Schulz iteration,

    X <- a X + (b A + c A^2) X,   A = X X^T,   (a, b, c) = (3.4445, -4.7750, 2.0315),   X_0 = u / ||u||

whose coefficients trade exactness (values end in about [0.7, 1.2]) for speed. Matrices of one shape, or of its
transpose, go through the iteration as one stacked product. A parameter of three dimensions is a stack of matrices.

Momentum is element by element, the iteration needs whole matrices. Where a rank holds a piece of a matrix, an
`Exchange` gives it the whole of u, and afterwards its own piece back:

    piece of g -> piece of m, u  --whole-->  u  -> orthogonalise(u)  --own-->  piece of the step
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.train.eight_bit import dequantise, empty_state, quantise

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Item = tuple[Tensor, Tensor, str | None]  # a parameter, its whole update, its name
STACK = 1 << 22  # numbers in one stacked product: larger stacks leave the CPU's cache (24 x 512 x 1376: 0.6x as fast)


def orthogonalise(stack: Tensor, iterations: int = 5, eps: float = 1e-7) -> Tensor:
    """(n, rows, cols) with rows <= cols, any float dtype -> the same, singular values near 1."""
    a, b, c = COEFFICIENTS
    X = stack / (torch.linalg.matrix_norm(stack, keepdim=True) + eps)
    for _ in range(iterations):
        A = X @ X.mT  # (n, rows, rows)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


class Exchange(Protocol):
    """How a matrix that is spread over ranks comes together. Every rank that shares it calls `whole` with the same
    names in the same order."""

    def whole(self, name: str, piece: Tensor) -> Tensor:
        """This rank's piece of an update, shaped like the piece of the parameter (empty: it has none) -> the whole
        matrix (rows, columns) or stack of matrices, of the same dtype."""
        ...

    def own(self, name: str, matrix: Tensor) -> Tensor:
        """A whole matrix -> this rank's piece of it."""
        ...


class Muon(torch.optim.Optimizer):
    """Muon over matrices. Parameters are changed in place (they may be views of a fused buffer).

    dtype: of the Newton-Schulz products; None: the parameters' own. bf16 is 4x as fast as fp32 on a CPU with bf16 units
    (18 x 192 x 512 on two threads: 10 ms against 48 ms) and differs by 1.2 %, well inside the iteration's own spread.
    state_bits: 8 keeps the momentum as `train.eight_bit` does. exchange: for pieces; each group then carries `names`,
    one a parameter, and a parameter without numbers stands for a piece that this rank does not have.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        state_bits: int = 32,
        exchange: Exchange | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "iterations": iterations,
            "weight_decay": weight_decay, "dtype": dtype, "state_bits": state_bits, "names": None,
        }  # fmt: skip
        super().__init__(parameters, defaults)
        self.exchange = exchange
        flat = [p for group in self.param_groups for p in group["params"] if p.ndim not in (2, 3)]
        if flat and exchange is None:
            raise HanlinError(
                f"Muon needs whole matrices; a parameter of shape {list(flat[0].shape)} is a share of one, and "
                "there is nothing to exchange shares by."
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients as they are; a closure is not supported and refused."""
        if closure is not None:
            raise ValueError("Muon takes no closure.")
        for group in self.param_groups:
            members = self._members(group)
            parameters = [parameter for _, parameter in members]
            if not parameters:
                continue
            updates = self._updates(parameters, group)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if self.exchange is None:
                self._move([(p, u, None) for p, u in zip(parameters, updates, strict=True)], group)
            else:
                for stack in self._gathered(members, updates):
                    self._move(stack, group)

    def _members(self, group: dict[str, Any]) -> list[tuple[str | None, Tensor]]:
        """(name, parameter) of what moves: without an exchange those with a gradient, with one all."""
        names: list[str | None] = group["names"] or [None] * len(group["params"])
        found: list[tuple[str | None, Tensor]] = list(zip(names, group["params"], strict=True))
        if self.exchange is None:
            return [(name, p) for name, p in found if p.grad is not None]
        missing = [name for name, p in found if p.grad is None and p.numel()]
        if missing:
            raise HanlinError(
                f"{missing[0]} has no gradient on this rank. Where ranks share matrices every piece needs one; zeros, "
                "where the parameter was not used."
            )
        return found

    def _updates(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The momenta, moved on, and what comes of them."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if group["state_bits"] == 8:
            return [self._update_8_bits(p, g, group) for p, g in zip(parameters, gradients, strict=True)]
        momenta = [self._momentum(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        if not group["nesterov"]:
            return momenta
        return list(torch._foreach_lerp(gradients, momenta, group["momentum"]))

    def _update_8_bits(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"], state["momentum_scale"] = empty_state(parameter, signed=True)
        momentum = dequantise(state["momentum"], state["momentum_scale"], signed=True).to(gradient.dtype)
        momentum.lerp_(gradient, 1 - group["momentum"])
        state["momentum"], state["momentum_scale"] = quantise(momentum, signed=True)
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _gathered(self, members: list[tuple[str | None, Tensor]], updates: list[Tensor]) -> Iterator[list[Item]]:
        """Whole matrices of which this rank has a piece, so many at a time as one stack may hold."""
        assert self.exchange is not None
        open_stack: list[Item] = []
        for (name, parameter), update in zip(members, updates, strict=True):
            assert name is not None
            matrix = self.exchange.whole(name, update)  # every rank takes part
            if not parameter.numel():
                continue
            if open_stack and sum(u.numel() for _, u, _ in open_stack) + matrix.numel() > STACK:
                yield open_stack
                open_stack = []
            open_stack.append((parameter, matrix, name))
        if open_stack:
            yield open_stack

    def _move(self, items: list[Item], group: dict[str, Any]) -> None:
        """Each parameter by its orthogonalised update."""
        whole = self.exchange is None
        moved = [parameter if whole else torch.zeros_like(update) for parameter, update, _ in items]
        targets = [matrix for x in moved for matrix in _matrices(x)]
        matrices = [matrix for _, update, _ in items for matrix in _matrices(update)]
        for members in equal_shapes(matrices):
            dtype = group["dtype"] or matrices[members[0]].dtype
            stack = torch.stack([wide(matrices[i]) for i in members]).to(dtype)  # (n, rows, cols), rows <= cols
            directions = orthogonalise(stack, group["iterations"]).to(matrices[members[0]].dtype)
            for i, direction in zip(members, directions, strict=True):
                rows, cols = targets[i].shape
                scale = max(1.0, rows / cols) ** 0.5
                targets[i].add_(direction.mT if rows > cols else direction, alpha=-group["lr"] * scale)
        if self.exchange is not None:
            for (parameter, _, name), step in zip(items, moved, strict=True):
                assert name is not None
                parameter.add_(self.exchange.own(name, step))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def _matrices(x: Tensor) -> list[Tensor]:
    """A matrix itself, or those of a stack, as views."""
    return [x] if x.ndim == 2 else list(x.unbind(0))


def wide(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever has no more rows than columns."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def equal_shapes(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices that are stacked together: one shape up to transposition, at most `STACK` numbers."""
    open_stacks: dict[tuple[Any, ...], list[int]] = {}
    stacks: list[list[int]] = []
    for index, matrix in enumerate(matrices):
        key = (*sorted(matrix.shape), matrix.dtype, matrix.device)
        members = open_stacks.get(key)
        if members is None or (len(members) + 1) * matrix.numel() > STACK:
            members = open_stacks[key] = []
            stacks.append(members)
        members.append(index)
    return stacks
