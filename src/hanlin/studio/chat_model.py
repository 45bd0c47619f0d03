"""What the caller offers on the page: an engine with its name, its card, first questions and first settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hanlin.engine import Engine, SamplingParams
from hanlin.studio.words import Language

CHAT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=512)


@dataclass(frozen=True)
class ChatModel:
    """One entry of the page's list of models.

    card: Markdown that says what this model is, what it knows and what it does not. examples: questions to click on.
    Both in one language for all, or a mapping with "en" and "zh". adapter: of those that the engine has loaded.
    """

    name: str
    engine: Engine
    card: Mapping[Language, str] | str = ""
    examples: Mapping[Language, Sequence[str]] | Sequence[str] = ()
    sampling: SamplingParams = field(default=CHAT_SAMPLING)
    adapter: str | None = None

    @property
    def label(self) -> str:
        """What the page calls it."""
        return self.name if self.adapter is None else f"{self.name} + {self.adapter}"


def with_adapters(models: Sequence[ChatModel]) -> Iterator[ChatModel]:
    """Each model, and behind it each adapter that its engine has at this moment."""
    for model in models:
        yield model
        for adapter in model.engine.adapters():
            yield replace(model, adapter=adapter)
