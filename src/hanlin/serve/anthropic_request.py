"""The body of Anthropic's POST /v1/messages, and how it becomes a chat request."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from hanlin.serve.chat_request import ChatRequest
from hanlin.serve.errors import ApiError
from hanlin.serve.messages import MAX_TOOLS
from hanlin.serve.refusals import Refusals, empty, never, one_of
from hanlin.serve.requests import Strict, checked

REFUSED: Refusals = {
    "container": (never, "no code is run here"),
    "mcp_servers": (empty, "this server contacts no other"),
    "service_tier": (one_of("auto", "standard_only"), "there is one tier"),
    "context_management": (empty, "conversations are not edited"),
    "inference_geo": (never, "there is one place"),
    "output_config": (empty, "effort and form of answers are not switched here"),
    "cache_control": (lambda found: True, "known prompts are kept without being asked"),
}


class Thinking(Strict):
    """A budget cannot be kept, so `enabled` is refused."""

    type: Literal["adaptive", "disabled"]


class AnthropicTool(Strict):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] = Field(default_factory=dict)
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None  # known prompts are kept without being asked
    strict: bool | None = None


class AnthropicChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountRequest(Strict):
    """POST /v1/messages/count_tokens"""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None

    @field_validator("thinking", mode="before")
    @classmethod
    def _no_budget(cls, found: Any) -> Any:
        if isinstance(found, dict) and found.get("type") == "enabled":
            raise ValueError("cannot be bounded by a budget here; send {'type': 'adaptive'} to let the model think")
        return found

    def as_chat(self) -> ChatRequest:
        """The same as a chat request; `ApiError` 400 for what does not act here."""
        return checked(ChatRequest, {name: value for name, value in self._chat().items() if value is not None})

    def _chat(self) -> dict[str, Any]:
        system = [] if self.system is None else [{"role": "system", "content": _text(self.system, "system")}]
        turns = [turn for number, message in enumerate(self.messages) for turn in _turns(message, number)]
        chat: dict[str, Any] = {"model": self.model, "messages": [*system, *turns]}
        if turns and turns[-1]["role"] == "assistant" and turns[-1].get("content") and "tool_calls" not in turns[-1]:
            chat |= {"continue_final_message": True, "add_generation_prompt": False}  # Anthropic's prefill
        if self.tools:
            chat["tools"] = [
                {
                    "type": "function",
                    "function": {"name": t.name, "description": t.description, "parameters": t.input_schema},
                }
                for t in self.tools
            ]
        if self.tool_choice is not None:
            if (self.tool_choice.type == "tool") != (self.tool_choice.name is not None):
                message = "'tool_choice.name' belongs to the type 'tool', which needs it."
                raise ApiError(400, message, param="tool_choice", code="invalid_value")
            named = {"type": "function", "function": {"name": self.tool_choice.name}}
            kinds = {"auto": "auto", "any": "required", "none": "none", "tool": named}
            chat["tool_choice"] = kinds[self.tool_choice.type]
            chat["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.thinking is not None:
            chat["reasoning_effort"] = "none" if self.thinking.type == "disabled" else None
        return chat


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] = Field(default_factory=list)
    stream: bool = False
    temperature: float = Field(1.0, ge=0.0, le=1.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)

    def _chat(self) -> dict[str, Any]:
        return super()._chat() | {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def _turns(message: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """One message as chat messages: results of tools are turns of their own there."""
    where = f"messages[{number}]"
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant") or set(message) - {"role", "content"}:
        raise _wrong(where, "expected a role, user or assistant, and content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not content:
        raise _wrong(f"{where}.content", "expected text or a list of blocks")
    turns: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for index, block in enumerate(content):
        place = f"{where}.content[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and role == "assistant" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "tool_use" and role == "assistant" and isinstance(block.get("input"), dict):
            arguments = json.dumps(block["input"], ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            result = _text(block.get("content") or "", f"{place}.content")
            turns.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        else:
            raise _wrong(place, f"a block of type {kind!r} is not supported here")
    if texts or calls or thoughts or not turns:
        turn: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
        turn |= {"tool_calls": calls} if calls else {}
        turn |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
        turns.append(turn)
    return turns


def _text(found: Any, where: str) -> str:
    """Text, or text blocks joined by line breaks."""
    if isinstance(found, str):
        return found
    blocks = found if isinstance(found, list) else [None]
    texts = [block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None for block in blocks]
    if not all(isinstance(text, str) for text in texts):
        raise _wrong(where, "expected text, or blocks of the type 'text'")
    return "\n".join(str(text) for text in texts)


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, f"'{param}': {message}.", param=param, code="invalid_value")
