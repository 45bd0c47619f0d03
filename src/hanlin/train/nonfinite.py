"""When a loss or a gradient is not finite: which step, which documents, which module, and where to go back to."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.transformer import Transformer
from hanlin.train.nonfinite_trace import trace_nonfinite
from hanlin.train.objective import Objective, step_loss


class NonFiniteError(HanlinError):
    """The loss or the gradient of a step is NaN or infinite. The weights are those before the step."""


def explain_nonfinite(
    model: Transformer,
    objective: Objective,
    parts: Sequence[Batch],
    device: torch.device,
    *,
    step: int,
    loss: float,
    norm: float,
    last_good: str,
    trace: bool = True,
) -> NonFiniteError:
    """The error for optimizer step `step` (1-based), after trying every row alone to find the ones at fault, and after
    one more pass that names the module (`train.nonfinite_trace`).

    The model must be able to read whole rows by itself. trace False: it cannot (a stage of a pipeline): then only the
    step and the documents are named.
    """
    if not trace:
        names = list(dict.fromkeys(name for part in parts for row in part.names for name in row))
        return NonFiniteError(_message(step, loss, norm, "", names, "", last_good))
    rows = [part.rows(i, i + 1) for part in parts for i in range(len(part))]
    taught = [index for index, row in enumerate(rows) if any(objective.count(row).values())]
    bad = [index for index in taught if not _finite_alone(model, objective, rows[index].to(device))]
    if not bad:
        culprit = "Each row's loss alone is finite"
    elif len(bad) == len(taught):
        culprit = "Every row's loss alone is non-finite too, so it is the weights that have diverged, not one document"
    else:
        culprit = (
            f"Alone, {_few([f'row {i}' for i in bad])} of {len(rows)} {'is' if len(bad) == 1 else 'are'} non-finite"
        )
    names = list(dict.fromkeys(name for i in bad or taught for per_row in rows[i].names for name in per_row))
    where = _where(model, objective, [rows[i] for i in bad[:1]] or list(parts), device)
    return NonFiniteError(_message(step, loss, norm, culprit, names, where, last_good))


def _message(step: int, loss: float, norm: float, culprit: str, names: list[str], where: str, last_good: str) -> str:
    found = f"documents: {_few(names)}" if names else "the batch names no documents"
    sentences = [
        f"Step {step}: the loss is {loss:g} and the gradient's norm {norm:g}; training stopped before the weights were "
        "touched.",
        f"{culprit} ({found})." if culprit else f"The step read {found}.",
        where,
        last_good,
        "Look at these documents, lower train.lr, or set train.clip.",
    ]
    return " ".join(filter(None, sentences))


def _where(model: Transformer, objective: Objective, parts: Sequence[Batch], device: torch.device) -> str:
    """What one more pass over `parts` says of the first module that went bad."""
    for part in parts:
        on_device = part.to(device)
        totals = objective.count(part)
        found = trace_nonfinite(model, partial(_loss_of, model, objective, on_device, totals))
        if found is not None:
            return str(found)
    return (
        "Run once more, the outputs and gradients of all modules are finite: a sum in another order, or another draw."
    )


def _loss_of(model: Transformer, objective: Objective, batch: Batch, totals: dict[str, float]) -> Tensor:
    return step_loss(objective.loss(model, batch)[0], totals)


@torch.no_grad()
def _finite_alone(model: Transformer, objective: Objective, row: Batch) -> bool:
    terms, _ = objective.loss(model, row)
    return all(bool(torch.isfinite(value)) for value, _ in terms)


def _few(names: Iterable[str], limit: int = 8) -> str:
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
