"""`objective: {kind: iterated}`: rounds in which the model writes answers, they are judged, and it learns from that."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.align.on_policy_recipe import RewardChoice
from hanlin.align.preference_recipe import PairKind
from hanlin.core.recipe import Section

IteratedMethod = Literal["spin", "self_rewarding", "online_dpo", "rlaif", "rso", "rft"]

DEFAULTS: dict[IteratedMethod, dict[str, float]] = {
    "spin": {"rounds": 3, "answers": 1, "temperature": 1.0, "top_p": 1.0},
    "self_rewarding": {"rounds": 2, "answers": 4, "temperature": 0.7, "top_p": 0.9},
    "online_dpo": {"rounds": 4, "answers": 2, "temperature": 1.0, "top_p": 1.0},
    "rlaif": {"rounds": 4, "answers": 2, "temperature": 1.0, "top_p": 1.0},
    "rso": {"rounds": 1, "answers": 16, "temperature": 1.0, "top_p": 1.0},
    "rft": {"rounds": 1, "answers": 8, "temperature": 1.0, "top_p": 1.0},
}
ACTS_IN: dict[str, tuple[IteratedMethod, ...]] = {  # option -> the methods in which it does something
    "link": ("spin", "self_rewarding", "online_dpo", "rlaif", "rso"),
    "beta": ("spin", "self_rewarding", "online_dpo", "rlaif", "rso"),
    "sft": ("spin", "self_rewarding", "online_dpo", "rlaif", "rso"),
    "judge": ("rlaif", "self_rewarding"),
    "rubric": ("rlaif", "self_rewarding"),
    "judge_samples": ("rlaif", "self_rewarding"),
    "accept_beta": ("rso",),
    "accepted": ("rso",),
    "keep": ("rft",),
    "threshold": ("rft",),
    "annotators": ("rft",),
}
REWARDED = ("online_dpo", "rso", "rft")


class IteratedObjective(Section):
    """A plain sequence of runs, each in a folder of its own: what is finished is not done again.

    spin (arXiv:2401.01335): the file's answer against the model's own. self_rewarding (arXiv:2401.10020): the model is
    its own judge. online_dpo (arXiv:2402.04792): of two answers the one that the reward likes better; rlaif
    (arXiv:2309.00267): that a judge likes better. rso (arXiv:2309.06657): answers that survive rejection sampling. rft
    (arXiv:2308.01825): fine-tuning on the best or the right answers; with annotators, the reward model is trained anew
    each round as for Llama 2 (arXiv:2307.09288).
    """

    kind: Literal["iterated"] = "iterated"
    method: IteratedMethod = "spin"
    files: Annotated[list[Path], Field(min_length=1, description="prompts; for spin with answers (chats, as kind sft)")]
    held_out: Annotated[
        list[Path], Field(default_factory=list, description="prompts whose answers are scored each round")
    ]
    held_out_rows: Annotated[int, Field(gt=0, description="of those prompts, at most")] = 200
    rewards: Annotated[list[RewardChoice], Field(default_factory=list, description="added up by weight")]
    rounds: Annotated[int | None, Field(gt=0, description="None: the method's usual number")] = None
    prompts_a_round: Annotated[int | None, Field(gt=0, description="None: all of them, each round")] = None
    answers: Annotated[int | None, Field(gt=0, description="to each prompt; None: the method's usual number")] = None
    max_tokens: Annotated[int, Field(gt=0, description="of an answer")] = 64
    temperature: Annotated[float | None, Field(gt=0)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    link: Annotated[PairKind | None, Field(description="how pairs are learnt; None: dpo, rso hinge")] = None
    beta: Annotated[float | None, Field(gt=0, description="of that; None: its default")] = None
    sft: Annotated[float | None, Field(ge=0, description="weight of the chosen answers' loss; None: the link's")] = None
    judge: Annotated[Path | None, Field(description="model folder; None: the model itself, as it is in each round")] = (
        None
    )
    rubric: Annotated[str | None, Field(min_length=1, description="what the judge is to look at")] = None
    judge_samples: Annotated[int | None, Field(gt=0, description="askings a judgement; None: 3, rlaif 1")] = None
    accept_beta: Annotated[float | None, Field(gt=0, description="rso: accept with exp((r - best) / this); 0.5")] = None
    accepted: Annotated[
        int | None, Field(gt=1, description="rso: answers to accept, of `answers`; a quarter of them")
    ] = None
    keep: Annotated[
        Literal["best", "correct"] | None, Field(description="rft: the best, or all that reach threshold")
    ] = None
    threshold: Annotated[float | None, Field(description="rft: a right answer's least reward; 1")] = None
    annotators: Annotated[
        list[RewardChoice] | None,
        Field(
            min_length=1, description="rft: who compares answers, for a reward model that is trained anew each round"
        ),
    ] = None
    seq_len: Annotated[int | None, Field(gt=1, description="of the runs; None: as they need")] = None
    packing: bool = True

    @model_validator(mode="after")
    def _acts(self) -> "IteratedObjective":
        for option, methods in ACTS_IN.items():
            if getattr(self, option) is not None and self.method not in methods:
                raise ValueError(f"`{option}` does nothing in method {self.method}, only in {', '.join(methods)}")
        wants = self.method in REWARDED and self.annotators is None
        if wants and not self.rewards:
            raise ValueError(f"method {self.method} needs `rewards`")
        if self.annotators is not None and self.rewards:
            raise ValueError("give `annotators`, whose judgements a reward model learns, or `rewards`, not both")
        if self.rewards and self.method not in REWARDED and not self.held_out:
            raise ValueError(
                f"`rewards` only measure in method {self.method}: give `held_out` prompts, or leave them out"
            )
        if self.annotators is not None and self.keep == "correct":
            raise ValueError(
                "`annotators` train a reward model that compares; `keep: correct` needs a verifier in `rewards`"
            )
        if self.threshold is not None and self.keep != "correct":
            raise ValueError("`threshold` belongs to `keep: correct`")
        if self.value("answers") < 2 and (self.method not in ("spin", "rft") or self.keep == "best"):
            raise ValueError(f"method {self.method} compares answers: `answers` must be at least 2")
        return self

    def value(self, option: str) -> float:
        """Rounds, answers, temperature or top_p: given, or the method's usual."""
        given = getattr(self, option)
        return DEFAULTS[self.method][option] if given is None else given
