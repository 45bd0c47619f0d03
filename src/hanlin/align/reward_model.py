"""A reward model as a reward (`align.samples`): samples in, one number each out, or one for every step of an answer.

    same tokenizer     prompt and answer as the policy read and wrote them, token for token
    another one        question and answer as text, through the reward model's own template

Samples are packed into rows and scored a bounded number of tokens at a time, without gradients. What a step is follows
from its separator; the policy's tokens at which steps end are `step_ends`.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from hanlin.align.reference import looking
from hanlin.align.reward import answer_rewards, reward_head, step_logits
from hanlin.align.reward_data import PLACE, step_ids
from hanlin.align.reward_export import load_reward_model
from hanlin.align.reward_recipe import SEPARATOR
from hanlin.align.samples import Sample
from hanlin.core.errors import HanlinError
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.evaluate.perplexity import rows_once
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer

TOKENS_AT_ONCE = 8192


class _Scorer:
    """What both kinds have in common: a model, its tokenizer, and whether that is the policy's too."""

    steps: bool

    def __init__(
        self,
        model: Transformer | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        own: Tokenizer | None = None,
        tokens: int = TOKENS_AT_ONCE,
    ) -> None:
        if not isinstance(model, Transformer):
            own = own or Tokenizer.load(model)
            model = load_reward_model(model)
        own = own or tokenizer
        if own is None:
            raise HanlinError("A reward model that is given as a model needs a tokenizer too.")
        reward_head(model, steps=self.steps)
        self.model, self.tokenizer, self._tokens = model, own, tokens
        self._same = tokenizer is None or tokenizer.fingerprint == own.fingerprint
        if not self._same and not own.has_chat:
            raise HanlinError(
                "The reward model has another tokenizer than the policy and no chat template, so it cannot be shown "
                "what the policy wrote. Put a chat_template.jinja into its folder."
            )

    def _packed(self, rows: Sequence[Example]) -> PackedExamples:
        """Rows to score, in which each document carries its place."""
        longest = max(len(row.ids) for row in rows)
        most = self.model.config.max_positions
        if most is not None and longest > most:
            over = next(row for row in rows if len(row.ids) == longest)
            raise HanlinError(
                f"{over.name} has {longest} tokens with its prompt; the reward model knows {most} positions. Let the "
                "policy write less, or take a reward model with more positions."
            )
        marked = [[Example(r.ids, r.trained, r.name, {PLACE: float(place)})] for place, r in enumerate(rows)]
        size = max(1, self._tokens // longest)
        return PackedExamples(marked, seq_len=max(longest, 2), rows_per_step=size, seed=0, pad_id=self.tokenizer.pad_id)

    def _parts(self, rows: Sequence[Example]) -> Iterator[tuple[SequenceBatch, Tensor]]:
        """The rows in packed batches, and which of them each document is."""
        for part in rows_once(self._packed(rows), None):
            assert isinstance(part, SequenceBatch)
            yield part.to(self.model.device), part.of_sequences(PLACE).long()

    def _question(self, sample: Sample) -> list[int]:
        """The prompt as the reward model reads it, up to where the answer begins."""
        if self._same:
            return list(sample.prompt_ids)
        return self.tokenizer.chat([{"role": "user", "content": sample.prompt.text}])


class ModelReward(_Scorer):
    """The reward of whole answers. model: a model with a head, or the folder of one, ours or transformers'; tokenizer:
    the policy's; own: the reward model's (None: that of the folder, of a model the policy's). tokens: of a batch."""

    steps = False

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return self.score([self._ids(sample) for sample in samples]).tolist() if samples else []

    def score(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Prompt and answer as tokens -> rewards (texts,) fp32 (fp64 for fp64)."""
        rows = [
            Example(list(row), [False] * (len(row) - 1) + [True], f"answer {place}") for place, row in enumerate(ids)
        ]
        if short := [row.name for row in rows if len(row.ids) < 2]:
            raise HanlinError(f"{short[0]} has fewer than two tokens with its prompt; there is nothing to score.")
        found: Tensor | None = None
        with looking(self.model):
            for part, places in self._parts(rows):
                rewards = answer_rewards(self.model, part).cpu()
                found = rewards.new_empty(len(rows)) if found is None else found
                found[places] = rewards
        assert found is not None
        return found

    def _ids(self, sample: Sample) -> list[int]:
        if self._same:
            return [*sample.prompt_ids, *sample.ids]
        turns = [{"role": "user", "content": sample.prompt.text}, {"role": "assistant", "content": sample.text}]
        chat = self.tokenizer.chat_trained(turns)
        return chat.ids[: chat.turns[-1][1]]


class ProcessReward(_Scorer):
    """The chance that each step of an answer is right: a list of numbers a sample. separator: what ends a step, as the
    process reward model learnt it; white space alone is no step. Else as `ModelReward`."""

    steps = True

    def __init__(
        self,
        model: Transformer | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        own: Tokenizer | None = None,
        tokens: int = TOKENS_AT_ONCE,
        separator: str = SEPARATOR,
    ) -> None:
        super().__init__(model, tokenizer, own=own, tokens=tokens)
        self.separator, self._policys = separator, tokenizer or self.tokenizer

    def ends(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The tokens of each answer, as the policy wrote them, at which its steps end: one for each reward."""
        return [step_ends(self._policys, sample.ids, self.separator) for sample in samples]

    def __call__(self, samples: Sequence[Sample]) -> list[list[float]]:
        rows = []
        for place, sample in enumerate(samples):
            ids = self._question(sample)
            trained = [False] * len(ids)
            for step in step_ids(self.tokenizer, split_steps(sample.text, self.separator), self.separator):
                ids += step
                trained += [False] * (len(step) - 1) + [True]
            rows.append(Example(ids, trained, f"answer {place}"))
        wanted = [place for place, row in enumerate(rows) if any(row.trained)]
        found: list[list[float]] = [[] for _ in samples]
        if not wanted:
            return found
        with looking(self.model):
            for part, places in self._parts([rows[place] for place in wanted]):
                logits = step_logits(self.model, part)
                chances = torch.softmax(logits, -1)[:, 1].tolist()
                for chance, sequence in zip(chances, part.trained.sequence.tolist(), strict=True):
                    found[wanted[int(places[sequence])]].append(chance)
        return found


def split_steps(text: str, separator: str = SEPARATOR) -> list[str]:
    """The steps of an answer without what separates them."""
    return [step for step in text.split(separator) if step.strip()]


def step_ends(tokenizer: Tokenizer, ids: Sequence[int], separator: str = SEPARATOR) -> list[int]:
    """The places in an answer's tokens at which its steps end, as many as `split_steps` finds: of the token that brings
    the separator's end; for a last step without a separator, of the last token of text."""
    control = {*tokenizer.stop_ids, *tokenizer.special.values()}
    pieces = [b"" if token in control else tokenizer.token_bytes(token) for token in ids]
    reached = list(accumulate(map(len, pieces)))  # bytes up to the end of each token
    text, mark = b"".join(pieces), separator.encode()
    ends, start = [], 0
    while start < len(text):
        at = text.find(mark, start)
        stop = len(text) if at < 0 else at + len(mark)
        if text[start : stop if at < 0 else at].decode(errors="replace").strip():
            ends.append(bisect_left(reached, stop))
        start = stop
    return ends
