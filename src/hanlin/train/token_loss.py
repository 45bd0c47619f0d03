"""The loss of trained tokens through the whole output head: transform, bias, scale, soft-cap, as the model has them.

    sum over targets of  -log softmax(z)[target],   z = softcap(scale * (W transform(h) + b))

Only trained tokens go through the transform: of a masked row that is one in seven. A model that is cut over ranks
(`parallel.tensor`) has its rows of W only, and its loss is vocabulary-parallel: equal on every rank.
"""

from typing import TypeVar

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.config import HeadConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.chunked_head import Head
from hanlin.nn.distillation import Divergence, linear_distillation
from hanlin.nn.losses import IGNORE, linear_cross_entropy, linear_dft
from hanlin.nn.token_values import token_logprobs_and_entropy
from hanlin.parallel import vocabulary

Kind = TypeVar("Kind", bound=Batch)


def token_loss(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross-entropies: hidden (..., width), targets (...) with `IGNORE` -> scalar, fp32 (fp64 for fp64)."""
    said, hidden, targets = _before_head(model, hidden, targets)
    if model.part is not None:
        head = _head(model, said)
        return vocabulary.vocabulary_parallel_loss(hidden, head, targets, model.config.vocab_size, model.part.group)
    return linear_cross_entropy(
        hidden, model.head_weight, targets, bias=model.head_bias, softcap=said.softcap, scale=said.scale
    )


def token_dft(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """As `token_loss`, each token's loss times its own probability (`nn.losses.linear_dft`)."""
    if model.part is not None:
        raise HanlinError(
            "objective.loss dft is not computed over a vocabulary that is cut over ranks: set parallel.tensor to 1."
        )
    said, hidden, targets = _before_head(model, hidden, targets)
    return linear_dft(hidden, _head(model, said), targets)


def token_sums(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(what `token_loss` gives, sum over the trained tokens of log(sum exp z)^2): a z-loss is a weight times the second
    (PaLM, arXiv:2204.02311, section 5). A third more work in the head than `token_loss`: ask for it where it is used.
    """
    said, hidden, targets = _before_head(model, hidden, targets)
    head = _head(model, said)
    if model.part is None:
        return vocabulary.token_sums(hidden, head, targets)
    return vocabulary.vocabulary_parallel_token_sums(hidden, head, targets, model.config.vocab_size, model.part.group)


def token_logprobs(
    model: Transformer, hidden: Tensor, ids: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log p(id | what stands before it) of single tokens, and the entropy of what was said there; with gradient.

    hidden (n, width): of the positions that predict them; ids (n,) -> (n,), (n,) or None, fp32 (fp64 for fp64).
    """
    states, head = head_of(model, hidden)
    return token_logprobs_and_entropy(states, head, ids, temperature=temperature, entropy=entropy)


def head_of(model: Transformer, hidden: Tensor) -> tuple[Tensor, Head]:
    """What the output matrix multiplies, made of hidden states (n, width), and the matrix, for functions of single
    tokens' logits (`nn.token_values`)."""
    if model.part is not None:
        raise HanlinError(
            "Log-probabilities of single tokens are not computed over a vocabulary that is cut over ranks: "
            "set parallel.tensor to 1 for this objective."
        )
    if model.config.head is None:
        raise HanlinError("This model was made without an output head, so it cannot predict tokens.")
    return model.head_hidden(hidden), _head(model, model.config.head)


def distillation_loss(
    model: Transformer, hidden: Tensor, teacher: Transformer, told: Tensor, divergence: Divergence
) -> Tensor:
    """Sum over tokens of a divergence (`nn.distillation`) between what the model and a teacher say comes next.

    hidden (n, width), told (n, the teacher's width): of the same positions -> scalar with gradient to the model alone.
    """
    states, head = head_of(model, hidden)
    with torch.no_grad():
        says, theirs = head_of(teacher, told)
    return linear_distillation(states, head, says, theirs, divergence=divergence)


def expect(batch: Batch, kind: type[Kind], objective: object) -> Kind:
    """The batch, if it is what the objective learns from."""
    if not isinstance(batch, kind):
        raise HanlinError(
            f"{type(objective).__name__} learns from a {kind.__name__}, found a {type(batch).__name__}: give it the "
            "data of its method (`hanlin.data.corruption.rows`)."
        )
    return batch


def _before_head(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[HeadConfig, Tensor, Tensor]:
    """The head's config, what its matrix multiplies, and the targets of that."""
    said = model.config.head
    if said is None:
        raise HanlinError("This model was made without an output head, so it cannot predict tokens.")
    if said.transform is not None:
        keep = targets != IGNORE
        hidden, targets = hidden[keep], targets[keep]  # (trained, width)
    return said, model.head_hidden(hidden), targets


def _head(model: Transformer, said: HeadConfig) -> Head:
    return Head(model.head_weight, model.head_bias, said.softcap, said.scale)
