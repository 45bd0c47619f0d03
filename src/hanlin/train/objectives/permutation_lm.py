"""Permutation language model with two streams: what a token says, and what is asked at its place.

    content stream   h_z_t  from  x_z_<=t        query stream   g_z_t  from  x_z_<t  and the place z_t
    loss = mean over predicted t of  -log softmax(W g_z_t)[x_z_t]

XLNet (arXiv:1906.08237, section 2.2–2.3). Only predicted places have a query stream.
"""

from hanlin.data.batch import Batch
from hanlin.data.corruption.batches import PermutationBatch
from hanlin.models.transformer import Transformer
from hanlin.models.two_streams import two_streams
from hanlin.nn.losses import IGNORE, count_targets
from hanlin.nn.masks import Permutation
from hanlin.train.objective import Metrics, Term
from hanlin.train.token_loss import expect, token_loss


class PermutationLM:
    """Mean over the predicted tokens. Batches of `PermutationRows`; padding has the last rank, so no one sees it."""

    def count(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(count_targets(batch.targets))}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        rows = expect(batch, PermutationBatch, self)
        at = rows.predict.clamp(min=0)
        _, query = two_streams(
            model,
            rows.ids,
            content_mask=Permutation(rows.order),
            query_mask=Permutation(rows.order, strict=True),
            at=at,
        )  # (rows, P, width)
        targets = rows.targets.gather(1, at).masked_fill(rows.predict < 0, IGNORE)  # (rows, P)
        total = token_loss(model, query, targets)
        return [(total, "tokens")], {"loss": (float(total.detach()), float(count_targets(targets)))}
