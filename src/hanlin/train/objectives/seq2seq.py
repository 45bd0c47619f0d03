"""Sequence to sequence: the encoder reads a (spoiled) source, the decoder writes the target.

    loss = mean over t of  -log p(y_t | y_<t, source)

T5's span corruption (arXiv:1910.10683), BART's denoising (arXiv:1910.13461) and translation differ in their data only.
"""

from hanlin.data.batch import Batch
from hanlin.data.corruption.batches import Seq2SeqBatch
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import count_targets
from hanlin.nn.masks import Causal
from hanlin.train.objective import Metrics, Term
from hanlin.train.objectives.masked_lm import real_tokens
from hanlin.train.token_loss import expect, token_loss


class Seq2Seq:
    """Mean over the target's tokens. Batches of `SpanRows` or `DenoisingRows`."""

    def count(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(count_targets(batch.targets))}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        rows = expect(batch, Seq2SeqBatch, self)
        mask = real_tokens(rows.source_documents)
        hidden = model(
            rows.ids,
            positions=rows.positions,
            mask=Causal(),
            source=model.encode(rows.source, mask=mask),
            source_mask=mask,
            logits=None,
        ).hidden
        total = token_loss(model, hidden, rows.targets)
        return [(total, "tokens")], {"loss": (float(total.detach()), float(count_targets(rows.targets)))}
