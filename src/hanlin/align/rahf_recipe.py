"""`objective: {kind: rahf}`: pairs, two forms of showing the direction, and where in the model it is followed."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.align.preference_recipe import PreferenceData

GOOD = "Answer as people like it: helpful, truthful, harmless and to the point."
BAD = "Answer as people dislike it: useless, untruthful, harmful or beside the point."
ACTS_IN = {"good": "dual", "bad": "dual", "hindsight": "scit", "good_prompt": "scit", "bad_prompt": "scit"}


class RahfObjective(PreferenceData):
    """Representation alignment (arXiv:2312.15997): hidden states follow a direction from disliked to liked.

    dual: two models, fine-tuned on the chosen and on the rejected answers. scit: one model, fine-tuned on both, told
    by its system prompt which kind is wanted. Models that are not given are trained first, in folders of the run.
    """

    kind: Literal["rahf"] = "rahf"
    form: Annotated[Literal["dual", "scit"], Field(description="two models, or one that is told what is wanted")] = (
        "dual"
    )
    alpha: Annotated[float, Field(gt=0, description="how far to go in the direction")] = 5.0
    layers: Annotated[
        list[int] | None,
        Field(min_length=1, description="whose outputs follow, from 0; None: every second one of the middle third"),
    ] = None
    last_tokens: Annotated[int, Field(gt=0, description="of an answer, the last so many are used")] = 64
    good: Annotated[Path | None, Field(description="dual: model folder, tuned on chosen answers")] = None
    bad: Annotated[Path | None, Field(description="dual: model folder, tuned on rejected answers")] = None
    hindsight: Annotated[Path | None, Field(description="scit: model folder, tuned under both system prompts")] = None
    good_prompt: Annotated[str | None, Field(min_length=1, description="scit: system prompt of liked answers")] = None
    bad_prompt: Annotated[str | None, Field(min_length=1, description="scit: system prompt of disliked answers")] = None
    first_epochs: Annotated[float, Field(gt=0, description="of the models that are trained first")] = 2.0
    first_lr: Annotated[float | None, Field(gt=0, description="of those; None: the usual one of fine-tuning")] = None

    @model_validator(mode="after")
    def _acts(self) -> "RahfObjective":
        for option, form in ACTS_IN.items():
            if getattr(self, option) is not None and self.form != form:
                raise ValueError(f"`{option}` does nothing in the form {self.form}, only in {form}")
        if (self.good is None) != (self.bad is None):
            raise ValueError("give both `good` and `bad`, or neither: then they are trained first")
        if self.overlong == "cut":
            raise ValueError("`overlong: cut` is not for rahf, whose states belong to whole answers; use drop")
        return self

    @property
    def shown(self) -> bool:
        """Whether the models that show the direction are there."""
        return self.good is not None if self.form == "dual" else self.hindsight is not None
