"""Chat templates: how messages become one text (Jinja, the dialect of `transformers`).

A template is a program from a model folder, so it runs in Jinja's sandbox: no attributes that lead out, no change of
what it is given. Blocks are trimmed as `transformers` does, and it may call `raise_exception` and `strftime_now`.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from hanlin.core.errors import HanlinError

TOOLS_OPENING = """You may call functions to answer. These are their signatures, one JSON object a line:
<tools>
"""
TOOLS_CLOSING = """</tools>
A call is written as a JSON object with the function's name and its arguments between tags:
<tool_call>
{"name": "…", "arguments": {…}}
</tool_call>"""

# Tools and their results are written in the way of Hermes and Qwen, reasoning stays in every turn: the text of a
# conversation only grows, so all of it can be trained.
CHATML = (
    "{%- set opening = " + json.dumps(TOOLS_OPENING) + " %}{%- set closing = " + json.dumps(TOOLS_CLOSING) + " %}"
    """
{%- set told = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' ~ told ~ ('\\n\\n' if told else '') ~ opening }}
    {%- for tool in tools %}
        {{- tool | tojson ~ '\\n' }}
    {%- endfor %}
    {{- closing ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('The role is ' ~ message.role ~ '; expected system, user, assistant or tool.') }}
    {%- elif message.role == 'system' and not loop.first %}
        {{- raise_exception('A system message stands first or nowhere.') }}
    {%- elif message.content is not string %}
        {{- raise_exception('The content of message ' ~ loop.index ~ ' is not text.') }}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role != 'system' or not tools %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n{"name": ' ~ call.function.name | tojson ~ ', "arguments": ' }}
            {{- call.function.arguments | tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)


class _Generation(ext.Extension):
    """`{% generation %}` marks the assistant's words in some templates; here it prints its body and nothing else."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, generate: bool, special: Mapping[str, str], **more: Any
) -> str:
    """The text of a conversation.

    generate: end with the opening of the assistant's turn. special: `bos_token`, `eos_token` … as the template may name
    them. more: further variables (`tools`, `enable_thinking` …). What the template refuses, or cannot do, is a
    `HanlinError`.
    """
    with _explained("refuses these messages"):
        return _compiled(template).render(
            messages=list(messages),
            add_generation_prompt=generate,
            **{"tools": None, "documents": None, **more},
            **special,
        )


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    room = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    room.filters["tojson"] = _to_json
    with _explained("is not valid Jinja"):
        return room.from_string(template, globals={"raise_exception": _refuse, "strftime_now": _now})


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; a prompt is not HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def _explained(what: str) -> Generator[None]:
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise HanlinError(f"The chat template {what}: line {error.lineno}: {error.message}.") from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise HanlinError(f"The chat template {what}: {str(error).rstrip('.')}.") from error
