"""The body of POST /v1/responses, and how it becomes a chat request.

Input items are messages, calls of functions, what they gave, and reasoning. Sampling parameters beyond OpenAI's have
their names of chat completions.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from hanlin.serve.chat_request import ChatRequest, Effort
from hanlin.serve.errors import ApiError
from hanlin.serve.messages import MAX_TOOLS
from hanlin.serve.refusals import Refusals, anything, empty, never, one_of
from hanlin.serve.requests import Strict, checked

MAX_ITEMS = 16384

# Only /v1/responses has these.
REFUSED: Refusals = {
    "background": (one_of(False), "answers are not computed in the background"),
    "truncation": (one_of("disabled"), "a conversation that does not fit is refused, not cut"),
    "max_tool_calls": (never, "calls are made by the client, who can count them"),
    "prompt": (never, "no prompts are stored here"),
    "conversation": (never, "conversations are continued with 'previous_response_id'"),
    "context_management": (empty, "conversations are not compacted"),
    "stream_options": (lambda found: found in ({}, {"include_obfuscation": False}), "no padding is added to events"),
    "prompt_cache_retention": (one_of("in_memory"), "known prompts are kept in memory as long as there is room"),
    "metadata": (anything, ""),
}

PASSED = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "typical_p"),
    *("repetition_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "logit_bias"),
    *("priority", "cache_salt", "parallel_tool_calls", "chat_template_kwargs"),
)
ROLES = ("system", "developer", "user", "assistant")
TEXTS = ("input_text", "output_text", "text")


class ReasoningOptions(Strict):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: None = None


class ResponseTextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: ResponseTextFormat = Field(default_factory=ResponseTextFormat)
    verbosity: Literal["medium"] | None = None


class ResponseTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Strict):
    type: Literal["function"]
    name: str


class ResponsesRequest(Strict):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: str | None = None
    reasoning: ReasoningOptions | None = None
    store: bool = True
    stream: bool = False
    text: TextOptions = Field(default_factory=TextOptions)
    tools: list[ResponseTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice = "auto"
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    temperature: Any = None
    top_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    top_k: Any = None
    min_p: Any = None
    typical_p: Any = None
    repetition_penalty: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    logit_bias: Any = None
    priority: Any = None
    cache_salt: Any = None
    parallel_tool_calls: Any = None
    chat_template_kwargs: Any = None

    @field_validator("input", mode="plain")
    @classmethod
    def _read_input(cls, found: Any) -> Any:
        items = [{"role": "user", "content": found}] if isinstance(found, str) else found
        if not isinstance(items, list) or not 0 < len(items) <= MAX_ITEMS:
            raise ValueError(f"must be a string or a list of 1 to {MAX_ITEMS} items")
        if not all(isinstance(item, dict) for item in items):
            raise ValueError("has an item that is no object")
        return items

    @property
    def logprobs(self) -> bool:
        return bool(self.include) or bool(self.top_logprobs)

    def as_chat(self, before: list[dict[str, Any]]) -> ChatRequest:
        """The same as a chat request. before: the messages of the conversation that this one continues."""
        chat: dict[str, Any] = {"model": self.model, "stream": self.stream}
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        chat["messages"] = merge_systems([*system, *before, *self.messages()])
        chat["max_tokens"] = self.max_output_tokens
        chat |= {name: getattr(self, name) for name in PASSED if getattr(self, name) is not None}
        if self.logprobs:
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.reasoning is not None and self.reasoning.effort is not None:
            chat["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            chat["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools]
        chosen = self.tool_choice
        chat["tool_choice"] = (
            chosen if isinstance(chosen, str) else {"type": "function", "function": {"name": chosen.name}}
        )
        form = self.text.format
        if form.type == "json_schema":
            chat["response_format"] = {"type": form.type, "json_schema": {"schema": form.schema_ or {}}}
        elif form.type == "json_object":
            chat["response_format"] = {"type": form.type}
        return checked(ChatRequest, {name: value for name, value in chat.items() if value is not None})

    def messages(self) -> list[dict[str, Any]]:
        """The input as chat messages; `ApiError` 400 for an item that does not act here."""
        messages: list[dict[str, Any]] = []
        thought: str | None = None
        for number, item in enumerate(self.input):
            assert isinstance(item, dict)
            where = f"input[{number}]"
            kind = item.get("type", "message")
            if kind == "message":
                message = _message(item, where)
            elif kind == "function_call":
                function = {"name": _string(item, "name", where), "arguments": _string(item, "arguments", where)}
                call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant" and thought is None:  # calls follow their words
                    messages[-1].setdefault("tool_calls", []).append(call)
                    continue
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
            elif kind == "function_call_output":
                text = _text(item.get("output"), f"{where}.output")
                message = {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": text}
            elif kind == "reasoning":
                parts = item.get("content") or item.get("summary") or []
                thought = "".join(part.get("text", "") for part in parts if isinstance(part, dict))
                continue
            else:
                raise _unsupported(f"{where}.type", f"items of type {kind!r} are not supported")
            if thought and message["role"] == "assistant":
                message["reasoning_content"] = thought
            thought = None
            messages.append(message)
        return messages


def merge_systems(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System and developer messages at the beginning as one, for templates that know only one."""
    first: list[str] = []
    rest = list(messages)
    while rest and rest[0]["role"] in ("system", "developer"):
        first.append(rest.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(first)}, *rest] if first else rest


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    unknown = set(item) - {"type", "role", "content", "id", "status", "phase"}
    if unknown:
        raise ApiError(400, f"Unknown parameter: '{where}.{min(unknown)}'.", param=where, code="unknown_parameter")
    if item.get("role") not in ROLES:
        raise _unsupported(f"{where}.role", f"the role is {item.get('role')!r}; expected one of {', '.join(ROLES)}")
    return {"role": item["role"], "content": _text(item.get("content"), f"{where}.content")}


def _text(found: Any, where: str) -> str:
    if isinstance(found, str):
        return found
    parts = found if isinstance(found, list) and found else [None]
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in TEXTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _unsupported(where, f"a part of type {kind!r} is not supported; only text is")
        texts.append(part["text"])
    return "\n".join(texts)


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        found = json.dumps(value, ensure_ascii=False)[:80]
        raise ApiError(400, f"'{where}.{name}' is {found}; expected text.", param=f"{where}.{name}")
    return value


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, f"'{param}': {message}.", param=param, code="unsupported_parameter")
