"""What the caller offers on the page: an engine with its name, its card, first questions and first settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hanlin.engine import Engine, SamplingParams
from hanlin.studio.words import Language

CHAT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=512)


@dataclass(frozen=True)
class ChatModel:
    """One entry of the page's list of models.

    card: Markdown that says what this model is, what it knows and what it does not. examples: questions to click on.
    Both in one language for all, or a mapping with "en" and "zh".
    """

    name: str
    engine: Engine
    card: Mapping[Language, str] | str = ""
    examples: Mapping[Language, Sequence[str]] | Sequence[str] = ()
    sampling: SamplingParams = field(default=CHAT_SAMPLING)
