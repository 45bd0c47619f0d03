"""Masked language model, and beside it next-sentence prediction where the batch holds pairs.

    loss = mean over chosen tokens of -log p(x_t | spoiled x)  +  mean over pairs of -log p(label | h of [CLS])

BERT (arXiv:1810.04805, section 3.1); RoBERTa (arXiv:1907.11692) is the first term alone.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.data.corruption.batches import MaskedBatch
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import count_targets
from hanlin.nn.masks import Bidirectional, Mask, Padding
from hanlin.nn.wide import wide
from hanlin.train.objective import Metrics, Term
from hanlin.train.token_loss import expect, token_loss


class MaskedLM:
    """Batches of `MaskedRows` or `PairRows`. Pairs need a submodule `next_sentence` of the model, as `nn.heads` has it:
    hidden states (rows, T, width) -> (rows, 2) logits."""

    def count(self, batch: Batch) -> dict[str, float]:
        rows = expect(batch, MaskedBatch, self)
        counts = {"tokens": float(count_targets(rows.targets))}
        return counts if rows.next_sentence is None else counts | {"pairs": float(count_targets(rows.next_sentence))}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        rows = expect(batch, MaskedBatch, self)
        hidden = model(
            rows.ids,
            positions=rows.positions,
            mask=real_tokens(rows.documents),
            segments=rows.segments,
            logits=None,
        ).hidden
        total = token_loss(model, hidden, rows.targets)
        tokens = float(count_targets(rows.targets))
        if rows.next_sentence is None:
            return [(total, "tokens")], {"loss": (float(total.detach()), tokens)}
        logits = wide(_pair_head(model)(hidden))  # (rows, 2)
        pairs = F.cross_entropy(logits, rows.next_sentence, reduction="sum")
        right = float((logits.argmax(-1) == rows.next_sentence).sum())
        metrics: Metrics = {
            "mlm_loss": (float(total.detach()), tokens),
            "nsp_loss": (float(pairs.detach()), float(len(rows))),
            "nsp_accuracy": (right, float(len(rows))),
        }
        return [(total, "tokens"), (pairs, "pairs")], metrics


def real_tokens(documents: Tensor) -> Mask:
    """Everyone sees every real token: documents (rows, T), -1 for padding."""
    real = documents >= 0
    return Bidirectional() if bool(real.all()) else Padding(real)


def _pair_head(model: Transformer) -> nn.Module:
    try:
        return model.get_submodule("next_sentence")
    except AttributeError as error:
        raise HanlinError(
            "The batch holds sentence pairs, but the model has no head `next_sentence` to judge them. Add "
            "one (`nn.heads.NextSentence`), or "
            "train on rows without pairs (`MaskedRows`)."
        ) from error
