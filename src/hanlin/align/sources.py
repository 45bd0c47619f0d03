"""Recipe → tokenizer and batches, without a model's weights: what training and `hanlin data preview` have in common."""

from collections.abc import Sequence
from pathlib import Path

from hanlin.align.conversations import read_conversations
from hanlin.align.method import Data
from hanlin.align.recipe import (
    CausalLmObjective,
    ContinuedObjective,
    NewModel,
    SftObjective,
    Shards,
    TrainRecipe,
)
from hanlin.align.sft import refuse_idle_last_turn, sft_examples, usual_epochs
from hanlin.core.seeds import derive
from hanlin.data.batch import BatchSource
from hanlin.data.examples import Example
from hanlin.data.mixture import Mixture
from hanlin.data.packing import PackedExamples
from hanlin.data.shards import TokenShards
from hanlin.data.text_batches import ShardedText
from hanlin.tokens import Tokenizer


def open_tokenizer(recipe: TrainRecipe) -> Tokenizer:
    """The recipe's tokenizer, or the saved model's own."""
    path = recipe.tokenizer
    if path is None:
        assert not isinstance(recipe.model, NewModel)
        path = recipe.model.path
    return Tokenizer.load(path)


class ShardRows:
    """The shard folders of a recipe as rows of `seq_len` tokens."""

    def __init__(self, recipe: TrainRecipe, tokenizer: Tokenizer, seq_len: int) -> None:
        self.recipe, self.tokenizer, self.seq_len = recipe, tokenizer, seq_len

    def read(self, path: Path, purpose: str) -> ShardedText:
        return ShardedText(
            TokenShards(path, self.tokenizer),
            seq_len=self.seq_len,
            rows_per_step=self.recipe.train.batch_size,
            seed=derive(self.recipe.seed, purpose),
        )

    def mixed(self, parts: Sequence[Shards], purpose: str) -> tuple[BatchSource, str]:
        """One source of several weighted ones, and a line about them."""
        sources = [self.read(part.path, f"{purpose}-{number}") for number, part in enumerate(parts)]
        return self.mix(sources, [part.weight for part in parts], purpose), _describe(sources)

    def held_out(self, paths: Sequence[Path], purpose: str) -> tuple[BatchSource, str]:
        """Rows drawn from all of the folders, not their first documents."""
        kept = [self.read(path, f"{purpose}-{number}") for number, path in enumerate(paths)]
        return self.mix(kept, [source.rows_per_epoch for source in kept], purpose), _describe(kept)

    def general(self, parts: Sequence[Shards], ratio: float, purpose: str, beside: str) -> tuple[BatchSource, str]:
        """Text like what the model was made of, so that it forgets less (replay, arXiv:2403.08763)."""
        source, about = self.mixed(parts, purpose)
        return source, f"{purpose}: {about}; {ratio:g} rows for each of {beside}"

    def mix(
        self, sources: Sequence[BatchSource], weights: Sequence[float], purpose: str, *, epoch_of: int | None = None
    ) -> BatchSource:
        if len(sources) == 1:
            return sources[0]
        rows, seed = self.recipe.train.batch_size, derive(self.recipe.seed, purpose, "mixture")
        return Mixture(sources, weights, rows_per_step=rows, seed=seed, epoch_of=epoch_of)


def _describe(sources: Sequence[ShardedText]) -> str:
    tokens, documents = sum(s.shards.tokens for s in sources), sum(s.shards.documents for s in sources)
    return f"{documents:,} documents, {tokens:,} tokens"


def causal_lm_data(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """Token shards, mixed."""
    objective = recipe.objective
    assert isinstance(objective, CausalLmObjective)
    shards = ShardRows(recipe, tokenizer, objective.seq_len)
    source, about = shards.mixed(objective.shards, "data")
    notes = [f"{about}; rows of {objective.seq_len} tokens"]
    held_out = {}
    if objective.held_out:
        held_out["eval"], about = shards.held_out(objective.held_out, "held-out")
        notes.append(f"held out: {about}")
    return Data(source, held_out, objective.seq_len, None, notes)


def continued_data(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """Domain, general text and conversations, each with its share of the rows."""
    objective = recipe.objective
    assert isinstance(objective, ContinuedObjective)
    shards = ShardRows(recipe, tokenizer, objective.seq_len)
    domain, about = shards.mixed(objective.domain, "domain")
    notes = [f"domain: {about}; rows of {objective.seq_len} tokens"]
    talk = objective.sft_share if objective.sft else 0.0
    sources, weights = [domain], [(1 - talk) / (1 + objective.ratio)]
    if objective.general:
        general, about = shards.general(objective.general, objective.ratio, "general", "the domain")
        notes.append(about)
        sources.append(general)
        weights.append(1 - talk - weights[0])
    if objective.sft:
        conversations = SftObjective(files=objective.sft, seq_len=objective.seq_len)
        found = _sft_data(recipe, conversations, tokenizer, None, quiet)
        notes += [f"conversations: {note}" for note in found.notes] + [f"conversations: {talk:.0%} of the rows"]
        sources.append(found.source)
        weights.append(talk)
    held_out = {}
    for name, paths in (("eval", objective.held_out), ("eval_general", objective.held_out_general)):
        if paths:
            held_out[name], about = shards.held_out(paths, "held-out" if name == "eval" else "held-out-general")
            notes.append(f"held out ({'domain' if name == 'eval' else 'general'}): {about}")
    return Data(shards.mix(sources, weights, "continued"), held_out, objective.seq_len, None, notes)


def sft_data(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """Conversations, packed."""
    assert isinstance(recipe.objective, SftObjective)
    return _sft_data(recipe, recipe.objective, tokenizer, positions, quiet)


def _sft_data(
    recipe: TrainRecipe, objective: SftObjective, tokenizer: Tokenizer, positions: int | None, quiet: bool
) -> Data:
    rows = recipe.train.batch_size
    reading = read_conversations(objective.files, bad_rows=objective.bad_rows)
    if objective.loss_on == "last_turn":
        refuse_idle_last_turn(reading.conversations)
    examples, report = sft_examples(
        reading.conversations, tokenizer,
        seq_len=objective.seq_len, max_positions=positions, loss_on=objective.loss_on, quiet=quiet,
    )  # fmt: skip
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
    held_out = {}
    if objective.held_out:
        kept = read_conversations(objective.held_out, bad_rows=objective.bad_rows)
        kept_examples, kept_report = sft_examples(
            kept.conversations, tokenizer, seq_len=report.seq_len, loss_on=objective.loss_on, quiet=quiet
        )
        notes.extend(f"held out: {line}" for line in kept_report.lines())
        if kept.skipped:
            notes.append(f"held out: {len(kept.skipped):,} rows are skipped, the first: {kept.skipped[0]}")
        held_out["eval"] = pack(kept_examples, 0)
    if objective.replay:
        shards = ShardRows(recipe, tokenizer, report.seq_len)
        replay, about = shards.general(objective.replay, objective.replay_ratio, "replay", "conversations")
        notes.append(about)
        return Data(
            shards.mix([source, replay], [1.0, objective.replay_ratio], "sft", epoch_of=0),
            held_out, report.seq_len, usual_epochs(len(examples)), notes,
        )  # fmt: skip
    return Data(source, held_out, report.seq_len, usual_epochs(len(examples)), notes)
