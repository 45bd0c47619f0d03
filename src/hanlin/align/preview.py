"""`hanlin data preview RECIPE`: what the model will see, before a second of training is spent on it.

One batch in two colours: tokens that are trained (the model is asked to produce them) and tokens that are only read.
Special tokens are spelled out, document borders are lines with the document's name. Where there is no colour (a pipe, a
log) trained stretches stand between ⟦ and ⟧. A wrong label mask is silent in the loss curve and obvious here.
"""

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from hanlin.align.methods import open_data
from hanlin.align.recipe import TrainRecipe
from hanlin.align.sources import open_tokenizer
from hanlin.data.batch import Batch
from hanlin.nn.losses import IGNORE
from hanlin.tokens import Tokenizer

TRAINED, READ, BORDER = "bold green", "bright_black", "cyan"


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one document with the same fate. text: as the model spells it, special tokens included."""

    document: int
    trained: bool
    text: str
    tokens: int


def preview(recipe: TrainRecipe, *, step: int = 0, rows: int | None = None, console: Console | None = None) -> None:
    """Print the first `rows` rows of the batch of `step` (None: all) and the counts of the whole batch.

    Nothing is trained and no weight is loaded.
    """
    console = console or Console(soft_wrap=True)
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer)
    batch = data.source.batch(step)
    shown = len(batch) if rows is None else min(rows, len(batch))
    for row in range(shown):
        console.print(Text(f"── row {row + 1} of {len(batch)} ".ljust(60, "─"), style=BORDER))
        midline = False
        for stretch in stretches(batch, row, tokenizer):
            if isinstance(stretch, str):
                console.print(Text(f"\n{stretch}" if midline else stretch, style=BORDER))
                midline = False
            else:
                console.print(_coloured(stretch, marks=not console.is_terminal), end="")
                midline = not stretch.text.endswith("\n")
        console.print()
    for line in (*counts(batch), *data.notes):
        console.print(Text(line))


def stretches(batch: Batch, row: int, tokenizer: Tokenizer) -> list[Stretch | str]:
    """One row as stretches, with a border line (a string) before each document; padding at the end is left out.

    A token is trained when the position before it has it as its target.
    """
    documents = batch.documents[row].tolist()
    ids = batch.ids[row].tolist()
    trained = [False, *(batch.targets[row, :-1] != IGNORE).tolist()]
    names = batch.names[row] if batch.names else ()
    found: list[Stretch | str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        same = end < len(ids) and documents[end] == documents[start] and trained[end] == trained[start]
        if same:
            continue
        number = documents[start]
        if number < 0:
            break
        if start == 0 or documents[start - 1] != number:
            found.append(f"┌ document {number + 1}" + (f": {names[number]}" if number < len(names) else ""))
        spelled = b"".join(tokenizer.token_bytes(token) for token in ids[start:end])
        found.append(Stretch(number, trained[start], spelled.decode("utf-8", errors="replace"), end - start))
        start = end
    return found


def counts(batch: Batch) -> list[str]:
    """The counts under a preview."""
    places = batch.ids.numel()
    trained = int((batch.targets != IGNORE).sum())
    documents = sum(int(row.max()) + 1 for row in batch.documents)
    return [
        f"{len(batch)} x {batch.ids.shape[1]} tokens, {documents} documents",
        f"{trained:,} tokens trained ({trained / max(batch.tokens, 1):.0%} of those read), "
        f"{batch.tokens - trained:,} only read, {places - batch.tokens:,} padding ({1 - batch.tokens / places:.0%})",
    ]


def _coloured(stretch: Stretch, *, marks: bool) -> Text:
    text = f"⟦{stretch.text}⟧" if marks and stretch.trained else stretch.text
    return Text(text, style=TRAINED if stretch.trained else READ)
