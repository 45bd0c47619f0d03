"""Adafactor (arXiv:1804.04235): second moments of a matrix from the sums of its rows and columns.

    G        = g^2 + eps_1                                        beta = 1 - t^-power
    row     <- beta row + (1 - beta) mean of G over columns
    column  <- beta column + (1 - beta) mean of G over rows
    V        = row column^T / mean(row)                           (a vector keeps V <- beta V + (1 - beta) G itself)
    U        = g / sqrt(V),   U <- U / max(1, rms(U) / clip)
    W       <- (1 - lr * decay) W - alpha U                       alpha = lr * max(eps_2, rms(W)), or lr

So a matrix of n x m numbers keeps n + m. A stack of matrices (experts) is treated matrix by matrix. Momentum, where it
is asked for, is an average of U, which costs n m again.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Optimizer):
    """A group with `factored=True` holds matrices (rows, columns) or stacks of them; any other is kept as it is. All of
    a matrix has to be here: its sums and sizes are over the whole."""

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-2,
        decay_power: float = 0.8,
        clip: float = 1.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        scale_by_weights: bool = True,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        factored: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "decay_power": decay_power, "clip": clip, "eps": eps, "scale_by_weights": scale_by_weights,
            "momentum": momentum, "weight_decay": weight_decay, "factored": factored,
        }  # fmt: skip
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients as they are; a closure is not supported and refused."""
        if closure is not None:
            raise ValueError("Adafactor takes no closure.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, factored = self.state[parameter], group["factored"]
        if not state:
            state["step"] = torch.zeros(())
            if factored:
                state["row"], state["column"] = (
                    gradient.new_zeros(_rows(parameter)),
                    gradient.new_zeros(_columns(parameter)),
                )
            else:
                state["variance"] = torch.zeros_like(gradient)
            if group["momentum"]:
                state["momentum"] = torch.zeros_like(gradient)
        state["step"] += 1
        share = float(state["step"]) ** -group["decay_power"]  # 1 - beta
        floor, smallest = group["eps"]
        square = gradient.square().add_(floor)
        if factored:
            row = state["row"].lerp_(square.mean(-1, keepdim=True), share)
            column = state["column"].lerp_(square.mean(-2, keepdim=True), share)
            variance = (row / row.mean(-2, keepdim=True)) * column
        else:
            variance = state["variance"].lerp_(square, share)
        update = gradient * variance.rsqrt()
        axes = _axes(parameter, factored)
        update.div_((_rms(update, axes) / group["clip"]).clamp_(min=1.0))
        if group["momentum"]:
            update = state["momentum"].lerp_(update, 1 - group["momentum"])
        rate = group["lr"]
        size = _rms(parameter, axes).clamp_(min=smallest) if group["scale_by_weights"] else 1.0
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(update * size, alpha=rate)


def _rows(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], 1)


def _columns(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-2], 1, x.shape[-1])


def _axes(x: Tensor, factored: bool) -> tuple[int, ...]:
    """Over which one root mean square goes: a matrix, or a vector (one of several: a bias of each expert)."""
    if factored:
        return (-2, -1)
    return (-1,) if x.ndim == 2 else tuple(range(x.ndim))


def _rms(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.square().mean(axes, keepdim=True).sqrt_()
