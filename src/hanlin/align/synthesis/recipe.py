"""`SynthesisRecipe`: what `hanlin data synthesize` reads."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.align.named_recipe import NamedRecipe
from hanlin.core.recipe import Section

Near = Annotated[float, Field(gt=0, description="ROUGE-L from which two texts are the same; above 1: equal words only")]
Batch = Annotated[int, Field(gt=0, description="a round, which is what a kill can lose")]


class OwnEngine(Section):
    """A model folder, in this process."""

    kind: Literal["engine"] = "engine"
    path: Annotated[Path, Field(description="model folder with a chat template")]
    max_batch: Annotated[int, Field(gt=0, description="chats computed together")] = 64
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Field(description="auto: what is fastest here")] = "auto"
    device: str = "auto"


class Endpoint(Section):
    """Any OpenAI-compatible server. Its key, if it wants one, is the environment variable OPENAI_API_KEY."""

    kind: Literal["endpoint"] = "endpoint"
    url: Annotated[str, Field(pattern="^https?://", description="where its API begins, such as http://HOST:8000/v1")]
    model: Annotated[str, Field(min_length=1, description="name of the model there")]
    concurrency: Annotated[int, Field(gt=0, le=1024, description="requests under way together")] = 8
    retries: Annotated[int, Field(ge=0, description="after 429, 5xx, lost connections; each waits longer")] = 5
    timeout: Annotated[float, Field(gt=0, description="seconds a request")] = 120.0


class Drawing(Section):
    """How answers are drawn."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(gt=0, description="longest answer")] = 512
    cut: Annotated[bool, Field(description="keep answers that max_tokens cut short")] = False


class SelfInstruct(Section):
    """New tasks like the seeds, with answers (arXiv:2212.10560)."""

    kind: Literal["self_instruct"] = "self_instruct"
    target: Annotated[int, Field(gt=0, description="tasks to make; may be raised later")] = 1000
    asks: Annotated[int, Field(gt=0, description="lists of tasks asked for a round")] = 8
    new: Annotated[int, Field(gt=0, description="tasks a list")] = 8
    shown: Annotated[int, Field(gt=0, description="tasks of the pool shown as examples")] = 8
    shown_made: Annotated[int, Field(ge=0, description="at most so many of them made, not seeds")] = 2
    near: Near = 0.7
    patience: Annotated[int, Field(gt=0, description="rounds without a new task after which it stops")] = 5


class EvolInstruct(Section):
    """Every seed rewritten to be harder or rarer, again and again (arXiv:2304.12244)."""

    kind: Literal["evol_instruct"] = "evol_instruct"
    epochs: Annotated[int, Field(gt=0, description="rewritings of each seed; may be raised later")] = 4
    batch: Batch = 64
    near: Near = 0.95
    check_gain: Annotated[bool, Field(description="ask the writer whether it says more; drop it if not")] = True


class Rejection(Section):
    """Several answers a question, of which the right and different ones are kept (arXiv:2308.01825)."""

    kind: Literal["rejection"] = "rejection"
    answers: Annotated[int, Field(gt=0, description="answers a question")] = 8
    verifier: Annotated[str, Field(description="exact, last_number, or module:function")] = "last_number"
    least: Annotated[float, Field(description="what the verifier must give at least")] = 1.0
    most: Annotated[int | None, Field(gt=0, description="answers kept a question; None: all that differ")] = None
    batch: Batch = 32
    near: Near = 1.01


class SynthesisRecipe(NamedRecipe):
    """`hanlin data synthesize RECIPE`: seeds and a writer in, conversations for `objective: {kind: sft}` out."""

    seeds: Annotated[list[Path], Field(min_length=1, description="tasks: conversations, rows with a question, or .txt")]
    language: Annotated[Literal["en", "zh"], Field(description="in which the writer is asked")] = "en"
    writer: Annotated[OwnEngine | Endpoint, Field(discriminator="kind")]
    method: Annotated[SelfInstruct | EvolInstruct | Rejection, Field(discriminator="kind")]
    sampling: Drawing = Drawing()
    overwrite: Annotated[bool, Field(description="begin anew in a folder that was made otherwise")] = False

    @model_validator(mode="after")
    def _draws(self) -> "SynthesisRecipe":
        if isinstance(self.method, Rejection) and self.method.answers > 1 and self.sampling.temperature == 0:
            raise ValueError("at temperature 0 all answers to a question are the same; raise `sampling.temperature`")
        return self
