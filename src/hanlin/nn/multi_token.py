"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): small modules behind a decoder that see one more
token each, and predict one further ahead.

    h'_i = W_k [ norm(embed(t_{i+k})) ; norm(h^{k-1}_i) ]        h^0: the decoder's hidden states
    h^k  = norm(layer_k(h'))                                     logits of t_{i+k+1} = head(h^k_i)

Embedding and head are the decoder's own. The causal chain is kept: unlike parallel heads, step k reads what step k - 1
understood. In training the sums of `losses_ahead` join the decoder's (in the paper with weight lambda / depth each,
lambda 0.3, later 0.1); in generation `draft` proposes `depth` tokens that the decoder verifies in one pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.nn.linear import Linear
from hanlin.nn.losses import IGNORE, linear_cross_entropy

Embed = Callable[[Tensor], Tensor]  # ids (rows, T) -> (rows, T, width)
Head = Callable[[Tensor], Tensor]  # hidden (..., width) -> logits (..., vocabulary)
Run = Callable[[nn.Module, Tensor], Tensor]  # a layer and its input (rows, T, width) -> its output; the caller knows
# what else the layer takes: rotary tables, the mask, a cache


class Step(nn.Module):
    """One step ahead, under the names of DeepSeek-V3's files. The columns of `eh_proj` stand as there: first those of
    the embedding, then those of the hidden state (the paper writes them the other way round)."""

    def __init__(self, width: int, layer: nn.Module, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = Linear(2 * width, width, bias=False)
        self.layer = layer
        self.norm = norm()

    def forward(self, hidden: Tensor, embedded: Tensor, run: Run) -> Tensor:
        """hidden (rows, T, width): h^{k-1}; embedded (rows, T, width): of the tokens k ahead -> h^k."""
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)
        return self.norm(run(self.layer, self.eh_proj(joined)))


@dataclass(frozen=True)
class Draft:
    """ids (rows, depth): the proposed tokens; logits (rows, depth, vocabulary): what each was chosen from."""

    ids: Tensor
    logits: Tensor


class MultiTokenPrediction(nn.Module):
    """layer: builds the transformer layer of step k = 0, 1, …; norm: builds a norm of `width`."""

    def __init__(
        self, depth: int, width: int, *, layer: Callable[[int], nn.Module], norm: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        if depth < 1:
            raise HanlinError(f"Multi-token prediction needs a depth of at least 1, found {depth}.")
        self.steps = nn.ModuleList(Step(width, layer(k), norm) for k in range(depth))

    def forward(self, hidden: Tensor, ids: Tensor, *, embed: Embed, run: Run) -> list[Tensor]:
        """hidden (rows, T, width): the decoder's, after its last norm; ids (rows, T): the tokens it read -> h^1 … h^D.

        All are (rows, T, width), so that rotary tables and masks are the decoder's; position i of h^k means something
        where token i + k exists in its document. A causal layer keeps the rest to itself, `losses_ahead` drops it.
        """
        if hidden.shape[:2] != ids.shape:
            raise HanlinError(
                f"Hidden states of {tuple(hidden.shape[:2])} tokens do not fit ids of {tuple(ids.shape)}."
            )
        outputs: list[Tensor] = []
        for ahead, step in enumerate(self.steps, start=1):
            hidden = step(hidden, embed(_shift(ids, ahead, 0)), run)
            outputs.append(hidden)
        return outputs

    @torch.no_grad()
    def draft(
        self,
        hidden: Tensor,
        ids: Tensor,
        *,
        embed: Embed,
        head: Head,
        run: Run,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Draft:
        """Propose the `depth` tokens after the next one.

        hidden (rows, T, width): the decoder's, of tokens 1 … T; ids (rows, T): tokens 2 … T + 1, the last of which the
        decoder has just chosen. T is the whole text, or, where `run` hands the layers a cache, what they have not read:
        besides new tokens those whose proposals were refused, at which steps after the first read a wrong token.
        choose: logits (rows, vocabulary) -> ids (rows,), the most likely one by default.
        """
        chosen: list[Tensor] = []
        logits: list[Tensor] = []
        for step in self.steps:
            hidden = step(hidden, embed(ids), run)
            logits.append(head(hidden[:, -1]))
            chosen.append(logits[-1].argmax(-1) if choose is None else choose(logits[-1]))
            ids = torch.cat([ids[:, 1:], chosen[-1][:, None]], 1)
        return Draft(torch.stack(chosen, 1), torch.stack(logits, 1))


def targets_ahead(targets: Tensor, ahead: int, documents: Tensor | None = None) -> Tensor:
    """What step `ahead` predicts at each position: the decoder's target `ahead` tokens later, within the same document.

    targets (rows, T): the decoder's, targets[i] = t_{i+1} or `IGNORE`; documents (rows, T): a number for each document
    of a row, None where a row is one document -> (rows, T), `IGNORE` past the end of the row or of the document.
    """
    shifted = _shift(targets, ahead, IGNORE)
    if documents is None:
        return shifted
    return shifted.masked_fill(_shift(documents, ahead, -1) != documents, IGNORE)


def losses_ahead(
    outputs: Sequence[Tensor], weight: Tensor, targets: Tensor, documents: Tensor | None = None
) -> list[Tensor]:
    """The sum of -log p(target) of each step; `count_targets(targets_ahead(...))` is its denominator.

    outputs: h^1 … h^depth of `MultiTokenPrediction`, (rows, T, width) each; weight (vocabulary, width): the decoder's
    head; targets and documents as `targets_ahead` takes them -> one scalar a step.
    """
    return [
        linear_cross_entropy(hidden, weight, targets_ahead(targets, ahead, documents))
        for ahead, hidden in enumerate(outputs, start=1)
    ]


def _shift(values: Tensor, by: int, fill: int) -> Tensor:
    """values (rows, T) moved `by` to the left, `fill` at the end."""
    return F.pad(values[:, by:], (0, min(by, values.shape[1])), value=fill)
