"""A conversation as token ids: the model's own chat template with tools, reasoning switches and unfinished turns.

A template that knows nothing of tools gets them as text: a system message that lists them, and calls and results in the
form that Hermes and Qwen models learnt (`<tool_call>{"name", "arguments"}</tool_call>`), which is also how the template
of Hanlin's own tokenizers writes them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hanlin.serve.chat_request import ChatRequest
from hanlin.serve.errors import ApiError
from hanlin.tokens import Tokenizer
from hanlin.tokens.chat_template import TOOLS_CLOSING, TOOLS_OPENING

Turns = Sequence[Mapping[str, Any]]


def prompt_ids(body: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """The prompt of a chat request; `HanlinError` where the template refuses it."""
    turns = [message.as_dict() for message in body.messages]
    variables = _variables(body, tokenizer)
    if body.continue_final_message:
        opened = template_ids(tokenizer, turns[:-1], body.offered, **variables)
        return opened + tokenizer.encode(str(body.messages[-1].content))
    return template_ids(tokenizer, turns, body.offered, generate=body.add_generation_prompt, **variables)


def template_ids(
    tokenizer: Tokenizer, turns: Turns, tools: Sequence[Mapping[str, Any]], *, generate: bool = True, **variables: Any
) -> list[int]:
    """Turns and tools through the model's template, or in words where it knows none."""
    _refuse_control_tokens(tokenizer, tools=tools, chat_template_kwargs=variables)
    if knows(tokenizer, "tools"):
        variables |= {"tools": tools} if tools else {}
    else:
        turns = in_words(turns, tools)
    return tokenizer.chat(turns, generate=generate, **variables)


def knows(tokenizer: Tokenizer, variable: str) -> bool:
    """Whether the model's template reads a variable of this name."""
    return re.search(rf"\b{re.escape(variable)}\b", tokenizer.chat_template or "") is not None


def _variables(body: ChatRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs)
    for name in variables:
        if not knows(tokenizer, name):
            message = f"'chat_template_kwargs' has '{name}', which this model's template does not read."
            raise ApiError(400, message, param="chat_template_kwargs", code="unsupported_parameter")
    effort = body.reasoning_effort
    if effort is None and (body.forced is not False or body.constraint() is not None):
        effort = "none"  # a prescribed form leaves no room for reasoning
    if effort is None:
        return variables
    switches = {"reasoning_effort": effort, "enable_thinking": effort != "none", "thinking": effort != "none"}
    known = {name: value for name, value in switches.items() if knows(tokenizer, name)}
    if not known and effort != "none":
        message = f"'reasoning_effort' is '{effort}', but this model's template has no reasoning switch."
        raise ApiError(400, message, param="reasoning_effort", code="unsupported_parameter")
    return known | variables


def _refuse_control_tokens(tokenizer: Tokenizer, **written: Any) -> None:
    """Messages are guarded by the tokenizer; the template's other variables are not, so they may hold none."""
    for name, value in written.items():
        text = json.dumps(value, ensure_ascii=False)
        if found := next((spelling for spelling in tokenizer.special if spelling in text), None):
            message = f"'{name}' holds the control token {found}, which only messages may (as plain letters)."
            raise ApiError(400, message, param=name, code="invalid_value")


def in_words(turns: Turns, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for a template without tools: only system, user and assistant, only text."""
    told: list[dict[str, Any]] = []
    answering = False  # the last turn told holds results of tools
    for turn in turns:
        if turn["role"] == "tool":
            result = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if answering:  # results of parallel calls share one turn
                told[-1]["content"] += "\n" + result
            else:
                told.append({"role": "user", "content": result})
            answering = True
            continue
        answering = False
        calls = [_in_tags(call["function"]) for call in turn.get("tool_calls", ())]
        text = "\n".join(part for part in (turn["content"], *calls) if part)
        told.append({name: turn[name] for name in ("role", "name") if name in turn} | {"content": text})
    if tools:
        lines = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        introduction = TOOLS_OPENING + lines + TOOLS_CLOSING
        if told and told[0]["role"] == "system":
            told[0]["content"] += "\n\n" + introduction
        else:
            told.insert(0, {"role": "system", "content": introduction})
    return told


def _in_tags(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
