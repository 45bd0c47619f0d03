"""`Sample`: one answer that a model wrote to a prompt, as rewards see it and as training learns from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Prompt:
    """What is asked. ids: as the model reads it, chat template and all; text: the question; meta: whatever else its
    row in the file says (`answer` ...); number: its place in the file; place: in the
    order of all that were drawn in a run, which tells two drawings of one prompt apart."""

    ids: tuple[int, ...]
    text: str
    meta: Mapping[str, Any]
    number: int = 0
    place: int | None = None


@dataclass(frozen=True)
class Sample:
    """ids: what follows the prompt, end token and tools' observations too; written: which of them the model wrote;
    logp: log-probability of each under the distribution that it was drawn from, filters and all (0 where not written);
    text: what the model wrote, observations left out; finish: how it ended; group: answers to one prompt share it;
    version: of the weights."""

    prompt: Prompt
    ids: Sequence[int]
    text: str
    logp: Sequence[float]
    written: Sequence[bool]
    finish: Literal["stop", "length"] = "stop"
    group: int = 0
    version: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.prompt.meta

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.prompt.ids

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.written)


# One number a sample; a list of numbers a sample for the steps of its answer; None: this reward does not apply.
Reward = Callable[[Sequence[Sample]], Sequence[float | list[float] | None]]
