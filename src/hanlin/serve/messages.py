"""The turns of a conversation: who speaks, text, calls of tools and what they gave.

Content is a string or a list of text parts, which are joined by line breaks. What a client sends back from an earlier
answer is read as it came out (`refusal: null`, `annotations: []`).
"""

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hanlin.serve.refusals import empty, never
from hanlin.serve.requests import Strict

MAX_TOOLS = 256

# Parts of an answer that a client may send back; they hold nothing here.
_LEFT_OVERS = {
    "refusal": (never, "refusals are not told apart from answers"),
    "annotations": (empty, "answers have no annotations"),
    "audio": (never, "only text goes in"),
    "function_call": (never, "it is the old form of 'tool_calls'"),
}


class FunctionTool(Strict):
    """What a function is called, does and takes (a JSON schema)."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, found: Any) -> Any:
        return {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else found

    def as_dict(self) -> dict[str, Any]:
        """As templates read it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool


class FunctionName(Strict):
    name: str


class NamedChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, found: str) -> str:
        try:
            value = json.loads(found or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a JSON object as text: {error}") from error
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object as text")
        return found or "{}"


class ToolCall(Strict):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def as_dict(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Message(Strict):
    """One turn. A tool's turn answers one call of the assistant's turn before."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_left_overs(cls, found: Any) -> Any:
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            return found
        found = dict(found)
        if "reasoning" in found and isinstance(found["reasoning"], str | None):  # vLLM's newer name
            found.setdefault("reasoning_content", found.pop("reasoning"))
        for name, (neutral, reason) in _LEFT_OVERS.items():
            if name in found and (found[name] is None or neutral(found[name])):
                del found[name]
            elif name in found:
                raise ValueError(f"'{name}' is not supported: {reason}")
        if "tool_calls" in found and found["tool_calls"] is None:
            del found["tool_calls"]
        if found.get("role") == "assistant" and found.get("tool_calls"):
            found.setdefault("content", None)
        return found

    @field_validator("content", mode="plain")
    @classmethod
    def _read_content(cls, found: Any) -> str | None:
        if isinstance(found, str) or found is None:
            return found
        if not isinstance(found, list) or not found:
            raise ValueError("must be a string or a non-empty list of text parts")
        for part in found:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"has a part of type {kind!r}; only {{'type': 'text', 'text': '…'}} is supported")
            more = {name: value for name, value in part.items() if name not in ("type", "text") and value is not None}
            if more:
                raise ValueError(f"has a text part with {next(iter(more))!r}, which does not act here")
        return "\n".join(part["text"] for part in found)

    @model_validator(mode="after")
    def _together(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("'content' is missing; only an assistant's turn that calls tools may have none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"'tool_calls' belongs to the assistant's turns, not to the role '{self.role}'")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("'tool_call_id' belongs to the role 'tool', which needs it")
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError("'reasoning_content' belongs to the assistant's turns")
        return self

    def as_dict(self) -> dict[str, Any]:
        """For the chat template, which knows no developer: it is the system's newer name."""
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        turn["content"] = self.content or ""
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                turn[name] = getattr(self, name)
        if self.tool_calls:
            turn["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return turn
