"""`objective: {kind: dpo}` and the like: learning from answers that were compared, with the field's defaults.

Left open, an option takes the default of its kind (`PreferenceObjective.chosen()`); one that does nothing in the kind
is refused by name.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.recipe import Section

PairKind = Literal["dpo", "cdpo", "robust", "hinge", "ipo", "dpop", "tdpo1", "tdpo2", "simpo", "orpo"]

WITHOUT_REFERENCE = ("simpo", "orpo")
DEFAULTS: dict[str, dict[str, float]] = {  # option -> kind -> default; kinds that are missing do not know the option
    "beta": {
        "dpo": 0.1, "cdpo": 0.1, "robust": 0.1, "hinge": 0.1, "ipo": 0.1, "dpop": 0.3, "tdpo1": 0.1, "tdpo2": 0.1,
        "simpo": 2.0, "orpo": 0.1,
    },
    "smoothing": {"cdpo": 0.1, "robust": 0.1},
    "penalty": {"dpop": 50.0},
    "alpha": {"tdpo1": 1.0, "tdpo2": 0.5},
    "gamma": {"simpo": 1.0},
    "sft": {
        "dpo": 0.0, "cdpo": 0.0, "robust": 0.0, "hinge": 0.0, "ipo": 0.0, "dpop": 0.0, "tdpo1": 0.0, "tdpo2": 0.0,
        "simpo": 0.0, "orpo": 1.0,
    },
}  # fmt: skip


class PreferenceData(Section):
    """What all of them read."""

    files: Annotated[list[Path], Field(min_length=1, description="judged answers, .json, .jsonl or .parquet")]
    held_out: Annotated[list[Path], Field(default_factory=list, description="such files for evaluation, never trained")]
    held_out_rows: Annotated[int, Field(gt=0, description="rows of an evaluation during training")] = 64
    seq_len: Annotated[
        int | None,
        Field(gt=1, description="tokens of a prompt with one answer; None: the power of two that holds 99.5 % whole"),
    ] = None
    packing: Annotated[bool, Field(description="several prompts' answers a row (they never see each other)")] = True
    overlong: Annotated[
        Literal["drop", "cut"], Field(description="an answer longer than seq_len: leave its row out, or cut its end")
    ] = "drop"
    bad_rows: Annotated[Literal["stop", "skip"], Field(description="what to do with a row that cannot be read")] = (
        "stop"
    )


class PreferenceObjective(PreferenceData):
    """Pairs {prompt, chosen, rejected}: the chosen answer becomes likelier than the rejected one.

    dpo (arXiv:2305.18290), cdpo and robust (labels that are sometimes wrong; arXiv:2403.00409), hinge (SLiC,
    arXiv:2305.10425), ipo (arXiv:2310.12036), dpop (the chosen must not get less likely; arXiv:2402.13228), tdpo1 and
    tdpo2 (token-level KL; arXiv:2404.11999): with a reference. simpo (arXiv:2405.14734), orpo (arXiv:2403.07691): none.
    """

    kind: PairKind = "dpo"
    beta: Annotated[
        float | None, Field(gt=0, description="how much a change of log-probabilities counts; 0.1, dpop 0.3, simpo 2")
    ] = None
    smoothing: Annotated[
        float | None, Field(ge=0, lt=0.5, description="cdpo, robust: share of pairs that are labelled wrongly; 0.1")
    ] = None
    penalty: Annotated[
        float | None, Field(ge=0, description="dpop: weight of the chosen answer's loss of likelihood; 50")
    ] = None
    alpha: Annotated[float | None, Field(ge=0, description="weight of the token-level KL; tdpo1 1, tdpo2 0.5")] = None
    gamma: Annotated[
        float | None, Field(ge=0, description="simpo: by how much the chosen must lead; half of beta is usual: 1")
    ] = None
    sft: Annotated[
        float | None, Field(ge=0, description="weight of the loss on the chosen answers' tokens; orpo 1, else 0")
    ] = None
    margin: Annotated[bool, Field(description="the chosen must lead by the row's `margin` (arXiv:2402.10571)")] = False
    reference: Annotated[
        Path | None, Field(description="model folder to compare with; None: the model as training finds it")
    ] = None

    @model_validator(mode="after")
    def _acts(self) -> "PreferenceObjective":
        for option, kinds in DEFAULTS.items():
            if getattr(self, option) is not None and self.kind not in kinds:
                raise ValueError(f"`{option}` does nothing in kind {self.kind}, only in {', '.join(kinds)}")
        if self.reference is not None and not self.needs_reference:
            raise ValueError(f"`reference` does nothing in kind {self.kind}, which has none")
        return self

    def value(self, option: str) -> float:
        """An option as it acts: given, or the default of the kind; 0 where the kind does not know it."""
        given = getattr(self, option)
        return DEFAULTS[option].get(self.kind, 0.0) if given is None else given

    @property
    def needs_reference(self) -> bool:
        return self.kind not in WITHOUT_REFERENCE


class KtoObjective(PreferenceData):
    """Answers that were called good or bad one by one, {prompt, completion, label} (KTO, arXiv:2402.01306)."""

    kind: Literal["kto"] = "kto"
    beta: Annotated[float, Field(gt=0, description="how much a change of log-probabilities counts")] = 0.1
    good_weight: Annotated[float, Field(ge=0, description="of an answer called good")] = 1.0
    bad_weight: Annotated[float, Field(ge=0, description="of an answer called bad")] = 1.0
    reference: Annotated[
        Path | None, Field(description="model folder to compare with; None: the model as training finds it")
    ] = None


class RrhfObjective(PreferenceData):
    """Several answers with scores, {prompt, completions, scores} (RRHF, arXiv:2304.05302); no reference."""

    kind: Literal["rrhf"] = "rrhf"
    length_power: Annotated[
        float, Field(ge=0, description="an answer's log-probability is divided by its length to this power")
    ] = 1.0
    rank_weight: Annotated[
        float, Field(ge=0, description="of the ranking loss, beside the loss on the best answer")
    ] = 1.0
