"""Supervised fine-tuning (InstructGPT, arXiv:2203.02155 §3.5): next-token loss on the assistant's tokens only.

A conversation goes through the chat template; its tokens are all read, and those that the assistant would have to
produce (its words and its end-of-turn token) are trained:

    <|im_start|>user\\n What is 2+2?<|im_end|>\\n<|im_start|>assistant\\n  4<|im_end|>  \\n
    ........................ read .....................................  trained      read

So the objective is `CausalLM` over other targets. Calls of tools and reasoning are the assistant's words like any
other, the results of tools are read (`align.template`). Conversations share rows and never see each other.
Defaults as the field teaches them: 1 epoch, 3 for at most 10,000 conversations; about ten times the rate at which
pretraining ended; cosine; no dropout.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hanlin.align.messages import Conversation, Message
from hanlin.align.recipe import SftObjective
from hanlin.align.template import LossOn, TrainingTemplate, learnt
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.core.progress import Progress
from hanlin.data.examples import Example
from hanlin.tokens import Tokenizer
from hanlin.train import CausalLM
from hanlin.train.objectives.supervised import Supervised

COVER = 0.995  # share of the conversations that the automatic sequence length holds whole
SMALL = 10_000  # conversations up to which three epochs are usual
FOREIGN_LR = 2e-5  # the usual rate for a model whose own training rate is unknown


@dataclass(frozen=True)
class SftReport:
    """What became of the conversations. Lengths are in tokens."""

    conversations: int
    tokens: int
    trained: int
    seq_len: int
    longest: int
    calls: int = 0  # of tools, that are learnt
    thoughts: int = 0  # turns with reasoning, that are learnt
    truncated: list[str] = field(default_factory=list)  # names of those cut at `seq_len`
    dropped: list[str] = field(default_factory=list)  # names of those with no trained token left

    def lines(self) -> list[str]:
        """For people: one line a fact."""
        share = 100 * self.trained / max(self.tokens, 1)
        lines = [
            f"{self.conversations:,} conversations, {self.tokens:,} tokens, {self.trained:,} trained ({share:.0f} %); "
            f"rows of {self.seq_len} tokens"
        ]
        if self.calls or self.thoughts:
            lines.append(f"learnt among them: calls of tools {self.calls:,}, turns with reasoning {self.thoughts:,}")
        if self.truncated:
            lines.append(
                f"{len(self.truncated):,} longer than {self.seq_len} tokens are cut there (the longest has "
                f"{self.longest:,}): {_some(self.truncated)}"
            )
        if self.dropped:
            lines.append(
                f"{len(self.dropped):,} are left out, nothing in their first {self.seq_len} tokens is trained: "
                f"{_some(self.dropped)}"
            )
        return lines


def sft_examples(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    seq_len: int | None = None,
    max_positions: int | None = None,
    loss_on: LossOn = "all_turns",
    quiet: bool = True,
) -> tuple[list[Example], SftReport]:
    """Conversations -> examples of at most `seq_len` tokens with the assistant's tokens marked.

    loss_on: whether all of the assistant's turns are learnt or the last one only (`align.template`).
    seq_len None: the smallest power of two that holds 99.5 % of the conversations whole, at most `max_positions`.
    A longer one is cut at its end; one with no trained token left is dropped; both are reported.
    """
    examples = []
    template = TrainingTemplate(tokenizer, loss_on=loss_on)
    with Progress("tokenise", total=len(conversations), unit="conversations", quiet=quiet) as bar:
        for conversation in conversations:
            examples.append(template.encode(conversation))
            bar.advance()
    lengths = [len(example.ids) for example in examples]
    if seq_len is None:
        seq_len = covering_length(lengths, max_positions)
    kept, truncated, dropped = [], [], []
    answers: list[Message] = []
    for conversation, example in zip(conversations, examples, strict=True):
        short = example
        if len(example.ids) > seq_len:
            short = Example(example.ids[:seq_len], example.trained[:seq_len], example.name)
        if not any(short.trained[1:]):  # the first token of a row is never predicted
            dropped.append(example.name)
            continue
        if short is not example:
            truncated.append(example.name)
        kept.append(short)
        answers += [conversation.messages[number] for number in learnt(conversation.messages, loss_on)]
    if not kept:
        raise HanlinError(
            f"No answer begins within {seq_len} tokens, so none of the {len(examples)} conversations can be learnt "
            f"from. Raise `objective.seq_len` (the longest conversation has {max(lengths, default=0)} tokens)."
        )
    report = SftReport(
        conversations=len(kept),
        tokens=sum(len(e.ids) for e in kept),
        trained=sum(sum(e.trained) for e in kept),
        seq_len=seq_len,
        longest=max(lengths),
        calls=sum(len(message.calls) for message in answers),
        thoughts=sum(message.reasoning is not None for message in answers),
        truncated=truncated,
        dropped=dropped,
    )
    return kept, report


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, *, loss_on: LossOn = "all_turns") -> Example:
    """One conversation as tokens; turns of the assistant with weight 0 are read and not trained. For many of them keep
    one `TrainingTemplate`."""
    return TrainingTemplate(tokenizer, loss_on=loss_on).encode(conversation)


def refuse_idle_last_turn(conversations: Sequence[Conversation]) -> None:
    """`HanlinError` where learning the last turn only is learning all of them."""
    for conversation in conversations:
        if learnt(conversation.messages, "last_turn") != learnt(conversation.messages, "all_turns"):
            return
    raise HanlinError(
        f"objective.loss_on is last_turn, but none of the {len(conversations):,} conversations has an earlier turn to "
        "leave out. Leave it out (all_turns learns the same)."
    )


def sft_objective(choice: SftObjective, *, ahead: int = 0, z_loss: float = 0.0) -> CausalLM:
    """Next-token prediction, with the noise and the loss of the recipe."""
    if choice.loss == "nll" and choice.neftune is None:
        return CausalLM(ahead=ahead, z_loss=z_loss)
    return Supervised(loss=choice.loss, neftune=choice.neftune, ahead=ahead, z_loss=z_loss)


def trained_runs(trained: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, stop) of each stretch of trained tokens."""
    edges = [i for i in range(len(trained) + 1) if _at(trained, i) != _at(trained, i - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def covering_length(lengths: Iterable[int], max_positions: int | None = None, *, share: float = COVER) -> int:
    """The smallest power of two (at least 32) that is no shorter than `share` of `lengths`; at most `max_positions`."""
    ordered = sorted(lengths)
    if not ordered:
        raise HanlinError("There are no conversations to measure.")
    needed = max(ordered[math.ceil(share * len(ordered)) - 1], 32)
    length = 2 ** math.ceil(math.log2(needed))
    return min(length, max_positions) if max_positions else length


def usual_epochs(conversations: int) -> float:
    """3 for a small set (at most 10,000 conversations), else 1."""
    return 3.0 if conversations <= SMALL else 1.0


def usual_lr(model: Path) -> tuple[float, str]:
    """(learning rate, why) for fine-tuning the model in folder `model`.

    Ten times the rate of the last pretraining step, never above that run's peak: read from the metrics of the run that
    the folder belongs to. A schedule that ended (nearly) at zero counts as having ended at a hundredth of its peak.
    """
    rates = [row["lr"] for row in read_metrics(model.parent / "metrics.jsonl") if row.get("lr") is not None]
    if not any(rates):
        return FOREIGN_LR, f"the usual rate; no metrics.jsonl beside {model} tells how it was trained"
    peak = max(rates)
    rate = min(peak, 10 * max(rates[-1], peak / 100))
    return rate, f"ten times the rate at which {model.parent.name} ended, at most its peak {peak:g}"


def _at(trained: Sequence[bool], index: int) -> bool:
    return 0 <= index < len(trained) and trained[index]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
