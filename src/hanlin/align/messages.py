"""`Conversation`: what a fine-tuning row says, whatever format it was written in; turns may call tools and reason.

    user        What is the weather in Oslo?
    assistant   (reasoning) I should look it up.   (calls) weather({"city": "Oslo"})
    tool        {"celsius": 7}                        answers that call
    assistant   7 degrees.

A call's arguments are an object here, as `plain()` gives them to a chat template; some templates want their JSON text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanlin.core.errors import HanlinError


class RowError(HanlinError):
    """One row that cannot be read."""


@dataclass(frozen=True)
class ToolCall:
    """id: by which the tool's turn says what it answers."""

    name: str
    arguments: Mapping[str, Any]
    id: str


@dataclass(frozen=True)
class Message:
    """role: system, user, assistant or tool. trained: False for an assistant's turn whose `weight` in the file is 0.
    reasoning and calls: of an assistant's turn; answers: the call whose result a tool's turn is."""

    role: str
    content: str
    trained: bool = True
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    answers: ToolCall | None = None


@dataclass(frozen=True)
class Conversation:
    """messages: at most one system message, first; the last one is the assistant's. name: `file:row`, for errors.
    tools: what may be called, each {"type": "function", "function": {"name", "description", "parameters"}}."""

    messages: tuple[Message, ...]
    name: str
    tools: tuple[Mapping[str, Any], ...] = ()

    def plain(self, *, arguments_as_text: bool = False, reasoning_key: str = "reasoning_content") -> list[dict]:
        """The messages as a chat template takes them."""
        return [_plain(message, arguments_as_text, reasoning_key) for message in self.messages]


def _plain(message: Message, arguments_as_text: bool, reasoning_key: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        turn[reasoning_key] = message.reasoning
    if message.calls:
        turn["tool_calls"] = [_plain_call(call, arguments_as_text) for call in message.calls]
    if message.answers is not None:
        turn |= {"tool_call_id": message.answers.id, "name": message.answers.name}
    return turn


def _plain_call(call: ToolCall, as_text: bool) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False) if as_text else call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def read_calls(value: Any, where: str) -> list[ToolCall]:
    """Calls as files write them: one or a list, as JSON or its text, with or without OpenAI's {"function": …} around.

    A call without an id has the id "" (`pair_results` gives it one).
    """
    found = _loaded(value, where, "a tool call")
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise RowError(f"{where}: the list of tool calls is empty.")
    _refuse_half_characters(calls, where)
    return [_read_call(call, where) for call in calls]


def _read_call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name.strip():
        raise RowError(f'{where}: a tool call is {_short(call)}; expected {{"name": "…", "arguments": {{…}}}}.')
    arguments = _loaded(function.get("arguments") or {}, where, f"the arguments of {name}")
    if not isinstance(arguments, Mapping):
        raise RowError(f"{where}: the arguments of the call of {name} are {_short(arguments)}; expected an object.")
    return ToolCall(name, arguments, call.get("id") or "")


def read_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Tool declarations: a list, as JSON or its text, of functions with or without OpenAI's {"function": …} around."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    found = _loaded(value, where, "`tools`")
    tools = []
    for tool in found if isinstance(found, list) else [found]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f'{where}: a tool is declared as {_short(tool)}; expected {{"name", "parameters"}}.')
        tools.append({"type": "function", "function": function})
    _refuse_half_characters(tools, where)
    return tuple(tools)


def pair_results(messages: Sequence[Message], asked: Sequence[str | None], where: str) -> list[Message]:
    """Give every call an id and every tool's turn the call that it answers.

    asked: for each message, the id that a tool's turn names, if it names one; else the results answer the calls in
    their order. A result that no call waits for is refused. Ids are made of nine letters and digits, which every
    template takes (Mistral's want exactly that).
    """
    paired: list[Message] = []
    waiting: list[ToolCall] = []
    made = 0
    for place, (message, wanted) in enumerate(zip(messages, asked, strict=True), start=1):
        if message.role == "tool":
            found = next((call for call in waiting if wanted in (None, call.id)), None)
            if found is None:
                named = f" with the id {wanted!r}" if wanted else ""
                raise RowError(f"{where}, turn {place} is the result of a tool, but no call{named} waits for one.")
            waiting.remove(found)
            paired.append(Message("tool", message.content, answers=found))
            continue
        waiting = []
        for call in message.calls:
            made += 1
            waiting.append(call if call.id else ToolCall(call.name, call.arguments, f"call{made:05d}"))
        paired.append(
            Message(message.role, message.content, message.trained, message.reasoning, tuple(waiting))
            if message.calls
            else message
        )
    return paired


def _loaded(value: Any, where: str, what: str) -> Any:
    """JSON of its text; everything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{where}: {what} is no JSON: {error}. It begins {value[:60]!r}.") from error


def _refuse_half_characters(value: Any, where: str) -> None:
    """JSON can spell half of a surrogate pair, no encoding of text can hold it."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise RowError(f"{where}: a tool's JSON holds half a character (the lone surrogate U+{half:04X}).") from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"
