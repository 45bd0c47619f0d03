"""Held-out text during training: loss, perplexity and bits per byte of rows that are never trained."""

from hanlin.data.batch import BatchSource
from hanlin.evaluate.perplexity import evaluate_text
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer
from hanlin.train.trainer import Evaluate


def held_out_loss(sources: dict[str, BatchSource], tokenizer: Tokenizer, rows: int) -> Evaluate | None:
    """An evaluation for the `Trainer`: loss, perplexity and bits per byte on `rows` held-out rows of each source."""
    if not sources:
        return None

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        values = {}
        for name, source in sources.items():
            found = evaluate_text(model, source, tokenizer=tokenizer, max_rows=rows)
            values |= {f"{name}/loss": found.loss, f"{name}/perplexity": found.perplexity}
            if found.bits_per_byte is not None:
                values[f"{name}/bits_per_byte"] = found.bits_per_byte
        return values

    return evaluate
