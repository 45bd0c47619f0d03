"""`objective: {kind: reward}` of a recipe: which judgements a reward model learns from, and how."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.align.preference_recipe import PreferenceData

Form = Literal["pairwise", "pointwise", "kwise", "listwise", "process"]

SEPARATOR = "\n"  # what ends a step, unless the recipe says otherwise
ACTS_IN = {  # option -> the forms in which it does something
    "margin": ("pairwise",),
    "centre": ("pairwise",),
    "target": ("pointwise",),
    "separator": ("process",),
}


class RewardObjective(PreferenceData):
    """A reward model: one number for an answer, learnt from judgements of answers (InstructGPT, arXiv:2203.02155 §3.5).

    What a row of the files holds follows from the form: pairwise {prompt, chosen, rejected}; pointwise {prompt,
    completion, score or label}; kwise and listwise {prompt, completions, scores}; process {prompt, steps, labels}.
    """

    kind: Literal["reward"] = "reward"
    form: Annotated[Form, Field(description="what is judged: pairs, single answers, several at once, or steps")] = (
        "pairwise"
    )
    margin: Annotated[
        bool | None, Field(description="pairwise: the chosen must lead by the row's `margin` (arXiv:2307.09288)")
    ] = None
    centre: Annotated[
        float | None, Field(ge=0, description="pairwise: weight of (r_chosen + r_rejected)^2; 0.01 is usual")
    ] = None
    target: Annotated[
        Literal["regression", "yes_no"] | None,
        Field(description="pointwise: squared error to `score` (the default), or the chance of `label` 1"),
    ] = None
    separator: Annotated[
        str | None, Field(min_length=1, description="process: what ends each step; a line break by default")
    ] = None
    actor: Annotated[
        Path | None, Field(description="model folder of the policy that will be trained, for the report's sizes")
    ] = None

    @model_validator(mode="after")
    def _acts(self) -> "RewardObjective":
        for option, forms in ACTS_IN.items():
            if getattr(self, option) is not None and self.form not in forms:
                raise ValueError(f"`{option}` does nothing in the form {self.form}, only in {' and '.join(forms)}")
        return self
