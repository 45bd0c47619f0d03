"""The loss of trained tokens through the whole output head: transform, bias, scale, soft-cap, as the model has them.

    sum over targets of  -log softmax(z)[target],   z = softcap(scale * (W transform(h) + b))

Only trained tokens go through the transform: of a masked row that is one in seven.
"""

from typing import TypeVar

from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import IGNORE, linear_cross_entropy

Kind = TypeVar("Kind", bound=Batch)


def token_loss(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross-entropies: hidden (..., width), targets (...) with `IGNORE` -> scalar, fp32 (fp64 for fp64)."""
    head = model.config.head
    if head is None:
        raise HanlinError("This model was made without an output head, so it cannot predict tokens.")
    if head.transform is not None:
        keep = targets != IGNORE
        hidden, targets = hidden[keep], targets[keep]  # (trained, width)
    return linear_cross_entropy(
        model.head_hidden(hidden),
        model.head_weight,
        targets,
        bias=model.head_bias,
        softcap=head.softcap,
        scale=head.scale,
    )


def expect(batch: Batch, kind: type[Kind], objective: object) -> Kind:
    """The batch, if it is what the objective learns from."""
    if not isinstance(batch, kind):
        raise HanlinError(
            f"{type(objective).__name__} learns from a {kind.__name__}, found a {type(batch).__name__}: give it the "
            "data of its method (`hanlin.data.corruption.rows`)."
        )
    return batch
