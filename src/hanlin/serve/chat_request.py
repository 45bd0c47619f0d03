"""The body of POST /v1/chat/completions. The other conversational routes turn theirs into one of these."""

from typing import Any, Literal

from pydantic import Field, field_validator

from hanlin.serve.errors import ApiError
from hanlin.serve.messages import MAX_TOOLS, Message, NamedChoice, Tool
from hanlin.serve.sampled import Sampled

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatRequest(Sampled):
    """model is required, as in OpenAI's interface."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    echo: bool = Field(False, description="with continue_final_message: the answer begins with what it continues")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=64)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own_variables(cls, found: dict[str, Any]) -> dict[str, Any]:
        reserved = {"messages", "tools", "documents", "add_generation_prompt"}
        if taken := [name for name in found if name in reserved or name.endswith("_token")]:
            raise ValueError(f"sets {taken[0]!r}, which the server sets")
        return found

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def forced(self) -> str | bool:
        """The tool that must be called, True for any of them, False if none must."""
        if isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice.function.name
        return self.tool_choice == "required"

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.function.as_dict() for tool in self.tools]

    def check_together(self, *, vocab_size: int) -> None:
        super().check_together(vocab_size=vocab_size)
        if self.top_logprobs is not None and not self.logprobs:
            raise self._wrong("top_logprobs", "has a meaning only with 'logprobs': true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise self._wrong("max_tokens", "and 'max_completion_tokens' are two names of one limit and differ")
        self._check_tools()
        last = self.messages[-1]
        if self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise self._wrong("continue_final_message", "and 'add_generation_prompt' exclude each other")
            if last.role != "assistant" or not last.content or last.tool_calls:
                raise self._wrong("continue_final_message", "needs a last message of the assistant's with text")
        elif self.echo:
            raise self._wrong("echo", "has a meaning only with 'continue_final_message': true")

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise self._wrong("tools", f"has two functions called '{twice}'")
        if self.forced is not False and not self.tools:
            raise self._wrong("tool_choice", "asks for a call, but 'tools' is empty")
        if isinstance(self.forced, str) and self.forced not in names:
            raise self._wrong("tool_choice", f"names '{self.forced}', which is not among 'tools'")
        if self.forced is not False and self.constraint() is not None:
            raise ApiError(
                400,
                "'tool_choice' asks for a call and another parameter prescribes the answer's form; send one.",
                param="tool_choice",
                code="invalid_value",
            )
