"""Learning a reward model: one objective, whose form says what is compared with what (`align.reward_loss`).

pairwise    -log sigmoid(r_chosen - r_rejected - margin)                      mean over pairs
kwise       the same over all pairs of a group of answers, one forward        mean over groups
listwise    Plackett-Luce: the order of the whole group                       mean over groups
pointwise   (r - score)^2, or binary cross-entropy with a label               mean over answers
process     cross-entropy of right and wrong at the end of each step          mean over steps
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hanlin.align.reward import answer_rewards, step_logits
from hanlin.align.reward_data import FIRST, LABEL
from hanlin.align.reward_loss import kwise_loss, listwise_loss, pairwise_loss, pointwise_loss, process_loss
from hanlin.align.reward_recipe import Form, RewardObjective
from hanlin.data.batch import Batch
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models.transformer import Transformer
from hanlin.train.objective import Metrics, Term
from hanlin.train.token_loss import expect

DENOMINATORS: dict[Form, str] = {
    "pairwise": "pairs",
    "kwise": "groups",
    "listwise": "groups",
    "pointwise": "answers",
    "process": "steps",
}


class Reward:
    """An `Objective` over judged answers. margin, centre, labelled: as the recipe says."""

    def __init__(
        self, form: Form = "pairwise", *, margin: bool = False, centre: float = 0.0, labelled: bool = False
    ) -> None:
        self.form, self.margin, self.centre, self.labelled = form, margin, centre, labelled

    @classmethod
    def of(cls, objective: RewardObjective) -> "Reward":
        """As a recipe asks for it."""
        return cls(
            objective.form,
            margin=bool(objective.margin),
            centre=objective.centre or 0.0,
            labelled=objective.target == "yes_no",
        )

    @property
    def truth(self) -> str:
        """What a pointwise answer's number is called."""
        return LABEL if self.labelled else "score"

    def fingerprint(self) -> dict[str, Any]:
        return {"form": self.form, "margin": self.margin, "centre": self.centre, "labelled": self.labelled}

    def count(self, batch: Batch) -> dict[str, float]:
        batch = expect(batch, SequenceBatch, self)
        if self.form == "process":
            number = len(batch.trained.ids)
        elif self.form == "pointwise":
            number = batch.sequences
        else:
            number = int(batch.of_sequences(FIRST).sum())
        return {DENOMINATORS[self.form]: float(number)}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        batch = expect(batch, SequenceBatch, self)
        return self.compare(self.say(model, batch), batch)

    def say(self, model: Transformer, batch: SequenceBatch) -> Tensor:
        """Rewards of the answers (answers,), or logits of the steps (steps, 2)."""
        return step_logits(model, batch) if self.form == "process" else answer_rewards(model, batch)

    def compare(self, said: Tensor, batch: SequenceBatch) -> tuple[list[Term], Metrics]:
        """Terms and metrics of what `say` gave."""
        total, metrics = COMPARE[self.form](self, said, batch)
        if said.ndim == 1:
            metrics = {**metrics, "reward": (float(said.detach().sum()), float(len(said)))}
        return [(total, DENOMINATORS[self.form])], metrics


def pairs_of(batch: SequenceBatch, form: Form) -> tuple[Tensor, Tensor]:
    """Places of the better and of the worse answer of every pair that is compared: (pairs,), (pairs,)."""
    if form == "pairwise":
        place = torch.arange(batch.sequences, device=batch.ids.device)
        return place[0::2], place[1::2]
    group, score = groups_of(batch), batch.of_sequences("score")
    better = (group[:, None] == group[None]) & (score[:, None] > score[None])
    high, low = better.nonzero(as_tuple=True)
    return high, low


def groups_of(batch: SequenceBatch) -> Tensor:
    """The number of every answer's group: (answers,)."""
    return batch.of_sequences(FIRST).long().cumsum(0) - 1


def _pairwise(choice: Reward, rewards: Tensor, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
    margin = batch.of_sequences("margin")[0::2] if choice.margin else None
    return pairwise_loss(rewards[0::2], rewards[1::2], margin, choice.centre)


def _kwise(choice: Reward, rewards: Tensor, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
    return kwise_loss(rewards, -batch.of_sequences("score"), groups_of(batch))


def _listwise(choice: Reward, rewards: Tensor, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
    return listwise_loss(rewards, -batch.of_sequences("score"), groups_of(batch))


def _pointwise(choice: Reward, rewards: Tensor, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
    return pointwise_loss(rewards, batch.of_sequences(choice.truth), kind="logistic" if choice.labelled else "squared")


def _process(choice: Reward, logits: Tensor, batch: SequenceBatch) -> tuple[Tensor, Metrics]:
    return process_loss(logits, batch.of_trained(LABEL))


COMPARE: dict[Form, Callable[[Reward, Tensor, SequenceBatch], tuple[Tensor, Metrics]]] = {
    "pairwise": _pairwise,
    "kwise": _kwise,
    "listwise": _listwise,
    "pointwise": _pointwise,
    "process": _process,
}
