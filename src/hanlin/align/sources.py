"""Recipe → tokenizer and batches, without a model's weights: what training and `hanlin data preview` have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hanlin.align.conversations import read_conversations
from hanlin.align.recipe import CausalLmObjective, NewModel, SftObjective, TrainRecipe
from hanlin.align.sft import sft_examples, usual_epochs
from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.batch import BatchSource
from hanlin.data.examples import Example
from hanlin.data.mixture import Mixture
from hanlin.data.packing import PackedExamples
from hanlin.data.shards import TokenShards
from hanlin.data.text_batches import ShardedText
from hanlin.models import load_config
from hanlin.tokens import Tokenizer


@dataclass(frozen=True)
class Data:
    """What a recipe trains on. epochs: the objective's usual number, if it has one; notes: what was decided or left
    out, for people."""

    source: BatchSource
    held_out: BatchSource | None
    seq_len: int
    epochs: float | None
    notes: list[str]


def open_tokenizer(recipe: TrainRecipe) -> Tokenizer:
    """The recipe's tokenizer, or the saved model's own."""
    path = recipe.tokenizer
    if path is None:
        assert not isinstance(recipe.model, NewModel)
        path = recipe.model.path
    return Tokenizer.load(path)


def open_data(recipe: TrainRecipe, tokenizer: Tokenizer, *, quiet: bool = True) -> Data:
    """The recipe's data as batches; needs no weights."""
    if isinstance(recipe.model, NewModel):
        positions = recipe.model.max_positions
    else:
        positions = load_config(recipe.model.path).max_positions
    objective = recipe.objective
    if objective.seq_len is not None and positions is not None and objective.seq_len > positions:
        raise HanlinError(
            f"objective.seq_len is {objective.seq_len}, but the model knows only {positions} positions. "
            f"Give at most {positions}, or a model with more."
        )
    if isinstance(objective, SftObjective):
        return _sft_data(recipe, objective, tokenizer, positions, quiet)
    return _causal_lm_data(recipe, objective, tokenizer)


def _causal_lm_data(recipe: TrainRecipe, objective: CausalLmObjective, tokenizer: Tokenizer) -> Data:
    def read(path: Path, purpose: str) -> ShardedText:
        return ShardedText(
            TokenShards(path, tokenizer),
            seq_len=objective.seq_len,
            rows_per_step=recipe.train.batch_size,
            seed=derive(recipe.seed, purpose),
        )

    def mix(sources: Sequence[ShardedText], weights: Sequence[float], purpose: str) -> BatchSource:
        if len(sources) == 1:
            return sources[0]
        rows, seed = recipe.train.batch_size, derive(recipe.seed, purpose, "mixture")
        return Mixture(sources, weights, rows_per_step=rows, seed=seed)

    def describe(sources: Sequence[ShardedText]) -> str:
        tokens, documents = sum(s.shards.tokens for s in sources), sum(s.shards.documents for s in sources)
        return f"{documents:,} documents, {tokens:,} tokens"

    sources = [read(part.path, f"data-{number}") for number, part in enumerate(objective.shards)]
    notes = [f"{describe(sources)}; rows of {objective.seq_len} tokens"]
    held_out = None
    if objective.held_out:  # rows drawn from all of it, not its first documents
        kept = [read(path, f"held-out-{number}") for number, path in enumerate(objective.held_out)]
        notes.append(f"held out: {describe(kept)}")
        held_out = mix(kept, [source.rows_per_epoch for source in kept], "held-out")
    source = mix(sources, [part.weight for part in objective.shards], "data")
    return Data(source, held_out, objective.seq_len, None, notes)


def _sft_data(
    recipe: TrainRecipe, objective: SftObjective, tokenizer: Tokenizer, positions: int | None, quiet: bool
) -> Data:
    rows = recipe.train.batch_size
    reading = read_conversations(objective.files, bad_rows=objective.bad_rows)
    examples, report = sft_examples(
        reading.conversations, tokenizer, seq_len=objective.seq_len, max_positions=positions, quiet=quiet
    )
    notes = report.lines()
    if reading.skipped:
        notes.append(f"{len(reading.skipped):,} rows are skipped, the first: {reading.skipped[0]}")

    def pack(examples: Sequence[Example], seed: int) -> PackedExamples:
        return PackedExamples(
            examples,
            seq_len=report.seq_len,
            rows_per_step=rows,
            seed=seed,
            pad_id=tokenizer.pad_id,
            pack=objective.packing,
        )

    source = pack(examples, derive(recipe.seed, "data"))
    notes.append(f"{source.rows_per_epoch:,} rows, {source.density:.0%} of their places filled")
    if source.rows_per_epoch < rows:
        notes.append(
            f"a step takes {rows} rows, more than there are: each stands {rows / source.rows_per_epoch:.3g} times in "
            "every step; a smaller train.batch_size makes more steps of an epoch"
        )
    held_out = None
    if objective.held_out:
        kept = read_conversations(objective.held_out, bad_rows=objective.bad_rows)
        kept_examples, kept_report = sft_examples(kept.conversations, tokenizer, seq_len=report.seq_len, quiet=quiet)
        notes.extend(f"held out: {line}" for line in kept_report.lines())
        if kept.skipped:
            notes.append(f"held out: {len(kept.skipped):,} rows are skipped, the first: {kept.skipped[0]}")
        held_out = pack(kept_examples, 0)
    return Data(source, held_out, report.seq_len, usual_epochs(len(examples)), notes)
