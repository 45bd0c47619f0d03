"""Prefix language model: everyone sees the prefix, what follows is predicted from left to right.

    loss = mean over t >= n of  -log p(x_t | x_<n in both directions, x_n … x_t-1)

UniLM (arXiv:1905.03197), T5's "prefix LM" (arXiv:1910.10683). A decoder as it is; only the mask differs.
"""

from hanlin.data.batch import Batch
from hanlin.data.corruption.batches import PrefixBatch
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import count_targets
from hanlin.nn.masks import Causal, Prefix
from hanlin.train.objective import Metrics, Term
from hanlin.train.token_loss import expect, token_loss


class PrefixLM:
    """Mean over the tokens behind the prefix. Batches of `PrefixRows`; padding stands at the end, where no token that
    counts can see it."""

    def count(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(count_targets(batch.targets))}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        rows = expect(batch, PrefixBatch, self)
        mask = Prefix(tuple(rows.prefix.tolist())) | Causal()
        hidden = model(rows.ids, positions=rows.positions, mask=mask, logits=None).hidden
        total = token_loss(model, hidden, rows.targets)
        return [(total, "tokens")], {"loss": (float(total.detach()), float(count_targets(rows.targets)))}
