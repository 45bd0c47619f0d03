"""How models write tool calls, and the grammar that makes them write one.

    hermes          <tool_call>{"name": N, "arguments": A}</tool_call>                   Hermes, Qwen
    llama           {"name": N, "parameters": A}            the whole answer, or behind <|python_tag|>
    mistral         [TOOL_CALLS][{"name": N, "arguments": A}, …]
    mistral-args    [TOOL_CALLS]N[ARGS]A[TOOL_CALLS]…                                    since its tokenizer v11
    deepseek        <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>N, a line break, A in a fence of
                    ```json, <｜tool▁call▁end｜>, …, <｜tool▁calls▁end｜>                     V3, R1
    deepseek-plain  the same with N<｜tool▁sep｜>A inside                                  since V3.1

N is the name, A the arguments as a JSON object. Which one a model writes is seen from how its chat template writes a
call of the past.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hanlin.core.errors import HanlinError
from hanlin.engine.constraints import json_rule
from hanlin.engine.types import Constraint
from hanlin.tokens import Tokenizer

FormatName = Literal["hermes", "llama", "mistral", "mistral-args", "deepseek", "deepseek-plain"]

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
OPENINGS: dict[FormatName, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral-args": ("[TOOL_CALLS]",),
    "deepseek": (CALLS_BEGIN, CALL_BEGIN),
    "deepseek-plain": (CALLS_BEGIN, CALL_BEGIN),
}
MARKERS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
MARKERS += (CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END)

NAME, QUOTED, ARGUMENTS = "⟦name⟧", "⟦quoted⟧", "⟦arguments⟧"
SHAPES: dict[FormatName, tuple[str, str, str, str]] = {  # before all calls, one call, between two, behind all
    "hermes": ("", f'<tool_call>\n{{"name": {QUOTED}, "arguments": {ARGUMENTS}}}\n</tool_call>', "\n", ""),
    "llama": ("", f'{{"name": {QUOTED}, "parameters": {ARGUMENTS}}}', "; ", ""),
    "mistral": ("[TOOL_CALLS][", f'{{"name": {QUOTED}, "arguments": {ARGUMENTS}}}', ", ", "]"),
    "mistral-args": ("", f"[TOOL_CALLS]{NAME}[ARGS]{ARGUMENTS}", "", ""),
    "deepseek": (
        CALLS_BEGIN,
        f"{CALL_BEGIN}function{SEPARATOR}{NAME}\n```json\n{ARGUMENTS}\n```{CALL_END}",
        "\n",
        CALLS_END,
    ),
    "deepseek-plain": (CALLS_BEGIN, f"{CALL_BEGIN}{NAME}{SEPARATOR}{ARGUMENTS}{CALL_END}", "", CALLS_END),
}
PROBE = "probe_tool"


@dataclass(frozen=True)
class ToolFormat:
    """How one model writes calls. special: those markers that are special tokens of its tokenizer, with their ids: a
    part of the syntax, so the text that is parsed must show them."""

    name: FormatName
    special: tuple[tuple[str, int], ...] = ()


def format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """How this model writes calls; None if neither its chat template nor its special tokens tell."""
    written, known = _written_call(tokenizer), tokenizer.special

    def has(marker: str) -> bool:
        return marker in (written or known)

    name: FormatName | None = None
    if has(CALL_BEGIN):
        name = "deepseek" if not written or "```json" in written else "deepseek-plain"
    elif has("[TOOL_CALLS]"):
        name = "mistral-args" if has("[ARGS]") else "mistral"
    elif has("<tool_call>"):
        name = None if "<function=" in written else "hermes"
    elif has("<|python_tag|>") or re.search(rf'"name": *"{PROBE}", *"parameters"', written):
        name = "llama"
    return name and ToolFormat(name, tuple((marker, known[marker]) for marker in MARKERS if marker in known))


def constraint_for(
    tools: Sequence[Mapping[str, Any]], choice: Any, form: ToolFormat, *, parallel: bool = True
) -> Constraint | None:
    """What the output must match so that it is a call, written in the model's own way.

    tools: as in the request, [{"type": "function", "function": {"name": …, "parameters": a JSON schema}}]; a tool
    without parameters takes none. choice: "required", or {"type": "function", "function": {"name": …}} for one tool;
    "auto", "none" and None leave the output free (None is returned). parallel: whether more calls may follow the first.
    """
    if choice in ("auto", "none", None):
        return None
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, Mapping):
        wanted = choice.get("function", choice).get("name")
        functions = [function for function in functions if function["name"] == wanted]
        if not functions:
            names = ", ".join(repr(tool["function"]["name"]) for tool in tools) or "none"
            raise HanlinError(f"tool_choice names the tool {wanted!r}, which is not among `tools` ({names}).")
    elif choice != "required":
        raise HanlinError(f"tool_choice is {choice!r}; expected none, auto, required or a named function.")
    if not functions:
        raise HanlinError("tool_choice is 'required', but there are no `tools`.")
    before, one, between, behind = SHAPES[form.name]
    start = [_lark(before, form), "call", f"({_lark(between, form)} call)*" if parallel else "", _lark(behind, form)]
    rules = [f"start: {' '.join(start)}", f"call: {' | '.join(f'call_{place}' for place in range(len(functions)))}"]
    for place, function in enumerate(functions):
        schema = function.get("parameters") or {"type": "object", "additionalProperties": False}
        rules.append(f"call_{place}: {_lark(one, form, name=function['name'], arguments=f'arguments_{place}')}")
        rules.append(f"arguments_{place}: {json_rule(schema)}")  # a rule of its own: its "$ref"s count from its root
    return Constraint("grammar", "\n".join(rules))


def _lark(shape: str, form: ToolFormat, *, name: str = "", arguments: str = "") -> str:
    """The body of a rule: special tokens by their ids, everything else as text."""
    special = dict(form.special)
    pieces = re.split("(" + "|".join(map(re.escape, [NAME, QUOTED, ARGUMENTS, *special])) + ")", shape)
    parts = []
    for piece in filter(None, pieces):
        if piece == ARGUMENTS:
            parts.append(arguments)
        elif piece in special:
            parts.append(f"<[{special[piece]}]>")
        else:
            text = {NAME: name, QUOTED: json.dumps(name, ensure_ascii=False)}.get(piece, piece)
            parts.append(json.dumps(text, ensure_ascii=False))
    return " ".join(parts)


def _written_call(tokenizer: Tokenizer) -> str:
    """What the chat template makes of a call of the past; "" if it takes none."""
    if not tokenizer.has_chat:
        return ""
    for arguments in ({"x": 1}, '{"x": 1}'):  # some templates want an object, some its JSON
        call = {"type": "function", "id": "abcDEF123", "function": {"name": PROBE, "arguments": arguments}}
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            written = tokenizer.decode(tokenizer.chat(probe, generate=False), skip_special=False)
        except HanlinError:
            continue
        if PROBE in written:
            return written
    return ""
