"""`SelectionRecipe`: what `hanlin data select` reads."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.align.named_recipe import NamedRecipe
from hanlin.core.recipe import Section

Keep = Annotated[int, Field(gt=0, description="examples to keep")]
Model = Annotated[Path, Field(description="model folder")]


class Embedding(Section):
    """Texts as vectors: mean last hidden states of any model folder (`Engine.embed`)."""

    model: Model
    text: Annotated[Literal["question", "answer", "both"], Field(description="what of an example is embedded")] = "both"


class Scores(Section):
    """Where a judge's scores come from."""

    column: Annotated[str | None, Field(description="a column of the files that holds the score")] = None
    reward_model: Annotated[Path | None, Field(description="folder of a reward model")] = None
    scorer: Annotated[str | None, Field(description="module:function, from a list of texts to their scores")] = None

    @model_validator(mode="after")
    def _one(self) -> "Scores":
        if [self.column, self.reward_model, self.scorer].count(None) != 2:
            raise ValueError("give one of `column`, `reward_model` and `scorer`")
        return self


class Reward(Section):
    """The best by a reward model's (or any judge's) score."""

    kind: Literal["reward"] = "reward"
    scores: Scores
    keep: Annotated[int | None, Field(gt=0, description="the best so many; give this or `least`")] = None
    least: Annotated[float | None, Field(description="all with at least this score")] = None
    bins: Annotated[int, Field(gt=0, description="groups of like length that give their best each; 1: none")] = 1

    @model_validator(mode="after")
    def _one(self) -> "Reward":
        if (self.keep is None) == (self.least is None):
            raise ValueError("give one of `keep` and `least`")
        if self.least is not None and self.bins > 1:
            raise ValueError("`bins` go together with `keep`, not with `least`")
        return self


class KCenter(Section):
    """Examples such that every other is near to one of them."""

    kind: Literal["k_center"] = "k_center"
    embed: Embedding
    keep: Keep


class Nuggets(Section):
    """Examples that help with others when shown once (arXiv:2312.10302). The model is that to be tuned."""

    kind: Literal["nuggets"] = "nuggets"
    model: Model
    anchors: Annotated[list[Path], Field(default_factory=list, description="conversations to help with; none: these")]
    count: Annotated[int, Field(gt=0, description="anchors: the middles of so many clusters of them")] = 100
    least: Annotated[float | None, Field(ge=0, le=1, description="golden score; give this or `keep`")] = 0.85
    keep: Annotated[int | None, Field(gt=0, description="the best so many instead (set `least: null`)")] = None

    @model_validator(mode="after")
    def _one(self) -> "Nuggets":
        if (self.keep is None) == (self.least is None):
            raise ValueError("give one of `keep` and `least` (it is 0.85 where nothing is said; null switches it off)")
        return self


class Car(Section):
    """The best of all and the best of every cluster (arXiv:2402.18191)."""

    kind: Literal["car"] = "car"
    scores: Scores
    embed: Embedding
    best: Annotated[int, Field(gt=0, description="the best of all")] = 1000
    each: Annotated[int, Field(ge=0, description="the best of each cluster")] = 1
    share: Annotated[float, Field(gt=0, le=1, description="of the variance that is clustered")] = 0.95


class Difficulty(Section):
    """By perplexity of the answer, or how much its question helps with it (IFD, arXiv:2308.12032)."""

    kind: Literal["difficulty"] = "difficulty"
    model: Model
    measure: Literal["perplexity", "ifd"] = "ifd"
    keep: Keep
    part: Annotated[Literal["top", "middle", "bottom"], Field(description="of the ranking, hardest first")] = "top"


class Diversity(Section):
    """The most typical examples of every cluster, in turn."""

    kind: Literal["diversity"] = "diversity"
    embed: Embedding
    keep: Keep
    clusters: Annotated[int | None, Field(gt=0, description="None: sqrt(n / 2)")] = None


class SelectionRecipe(NamedRecipe):
    """`hanlin data select RECIPE`: conversations in, those worth training on out, with a reason for each."""

    files: Annotated[list[Path], Field(min_length=1, description="conversations, all in one format")]
    bad_rows: Annotated[Literal["stop", "skip"], Field(description="what to do with a row that cannot be read")] = (
        "stop"
    )
    method: Annotated[
        Reward | KCenter | Nuggets | Car | Difficulty | Diversity, Field(discriminator="kind", description="how")
    ]
    device: str = "auto"
