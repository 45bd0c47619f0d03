"""The body of POST /v1/completions."""

from typing import Any

from pydantic import Field, field_validator

from hanlin.serve.sampled import Sampled, check_ids

MAX_PROMPTS = 2048


class CompletionRequest(Sampled):
    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0, description="0 only together with echo: the prompt's log-probabilities")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("prompt", mode="plain")
    @classmethod
    def _read_prompt(cls, found: Any) -> Any:
        if isinstance(found, str) or is_ids(found):
            return found
        many = found if isinstance(found, list) and len(found) <= MAX_PROMPTS else []
        if many and (all(isinstance(item, str) for item in many) or all(is_ids(item) for item in many)):
            return many
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or a list of such lists, "
            f"none empty and at most {MAX_PROMPTS} prompts"
        )

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts as a list of them."""
        return as_many(self.prompt)

    def check_together(self, *, vocab_size: int) -> None:
        super().check_together(vocab_size=vocab_size)
        if self.max_tokens == 0 and not self.echo:
            raise self._wrong("max_tokens", "is 0: nothing to do without 'echo'")
        for prompt in self.prompts:
            check_ids("prompt", (token for token in prompt if isinstance(token, int)), vocab_size)


def as_many(prompt: Any) -> list[str | list[int]]:
    """A prompt, or a list of prompts, as a list of them."""
    return [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt


def is_ids(found: Any) -> bool:
    """A non-empty list of token ids."""
    return isinstance(found, list) and bool(found) and all(type(item) is int for item in found)
