"""Minutes into optimizer steps.

minutes = text, tokenizer, shards (spent already) + pretraining + instruction tuning + evaluation
"""

from dataclasses import dataclass

from hanlin.quickstart.recipe import TimePlan

FEWEST = 8  # steps below which no schedule makes sense


@dataclass(frozen=True)
class Steps:
    """What the minutes allow."""

    pretrain: int
    sft: int


def plan_steps(
    plan: TimePlan,
    *,
    minutes: float,
    spent: float,
    seconds_a_step: tuple[float, float],
    steps_an_epoch: tuple[int, int],
) -> Steps:
    """Steps of (pretraining, instruction tuning) so that everything ends after `minutes`; spent: seconds so far."""
    whole = minutes * 60
    evaluation = min(plan.evaluation * whole, plan.longest_evaluation)
    training = max(whole - spent - evaluation, plan.least_training * whole)
    sft = min(plan.sft * training / seconds_a_step[1], plan.most_sft_epochs * max(1, steps_an_epoch[1]))
    pretrain = (training - sft * seconds_a_step[1]) / seconds_a_step[0]
    pretrain = min(pretrain, plan.most_epochs * max(1, steps_an_epoch[0]))
    return Steps(max(FEWEST, int(pretrain)), max(FEWEST, int(sft)))
