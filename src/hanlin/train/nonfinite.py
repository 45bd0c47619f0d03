"""When a loss or a gradient is not finite: which step, which documents, and where to go back to."""

from collections.abc import Iterable, Sequence

import torch

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.transformer import Transformer
from hanlin.train.objective import Objective


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
) -> NonFiniteError:
    """The error for optimizer step `step` (1-based), after trying every row alone to find the ones at fault."""
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
    sentences = [
        f"Step {step}: the loss is {loss:g} and the gradient's norm {norm:g}; training stopped before the weights were "
        "touched.",
        f"{culprit} ({'documents: ' + _few(names) if names else 'the batch names no documents'}).",
        last_good,
        "Look at these documents, lower train.lr, or set train.clip.",
    ]
    return NonFiniteError(" ".join(filter(None, sentences)))


@torch.no_grad()
def _finite_alone(model: Transformer, objective: Objective, row: Batch) -> bool:
    terms, _ = objective.loss(model, row)
    return all(bool(torch.isfinite(value)) for value, _ in terms)


def _few(names: Iterable[str], limit: int = 8) -> str:
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
