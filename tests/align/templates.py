"""Chat templates of the kinds that models come with, written for these tests, and a tokenizer that has one of them."""

import json
from pathlib import Path

from hanlin.tokens import Tokenizer

HERMES = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' ~ m.content ~ '</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' }}
        {%- if m.reasoning_content %}{{- '<think>' ~ m.reasoning_content ~ '</think>' }}{%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# nothing but text
WORDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the reasoning of all answers but those behind the last request is left out
FORGETFUL = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
) + HERMES.replace("{%- if m.reasoning_content %}", "{%- if m.reasoning_content and loop.index0 > ns.last %}")
# arguments as JSON text, as some models learnt them
TEXTUAL = HERMES.replace("{{- call.function.arguments | tojson }}", "{{- call.function.arguments + '' }}")
PYTHONIC = HERMES.replace("{{- call.function.arguments | tojson }}", "{{- call.function.arguments ~ '' }}")
# the end of a turn is written by the turn that follows it
LATE_END = (
    "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)
# the answers are not written at all
SILENT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer: Tokenizer, template: str, folder: Path) -> Tokenizer:
    """The tokenizer with another chat template, from `folder`."""
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(config.read_text()).items() if key != "chat_template"}
    config.write_text(json.dumps(settings))
    return Tokenizer.load(folder)
