"""Calls come out as they were written, however the text was cut; what only looks like a call stays text."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.engine.constraints import Constraints
from hanlin.serve.tool_calls import Arguments, CallStart, Content, Delta, ToolParser
from hanlin.serve.tool_formats import SHAPES, FormatName, ToolFormat, constraint_for, format_of
from hanlin.tokens import Tokenizer

B, E, b, s, e = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)
NAMES = ("get_weather", "查天气", "f")


def written(name: FormatName, calls: list[tuple[str, str]]) -> str:
    """How each format is written, spelled out by hand."""
    objects = [f'{{"name": {json.dumps(call)}, "arguments": {arguments}}}' for call, arguments in calls]
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
        case "llama":
            return "; ".join(one.replace('"arguments"', '"parameters"', 1) for one in objects)
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(objects)}]"
        case "mistral-args":
            return "".join(f"[TOOL_CALLS]{call}[ARGS]{arguments}" for call, arguments in calls)
        case "deepseek":
            inner = (f"{b}function{s}{call}\n```json\n{arguments}\n```{e}" for call, arguments in calls)
            return B + "\n".join(inner) + E
        case "deepseek-plain":
            return B + "".join(f"{b}{call}{s}{arguments}{e}" for call, arguments in calls) + E


def parse(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments), …]) of a stream."""
    parser = ToolParser(ToolFormat(form), names=NAMES)
    deltas: list[Delta] = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    content, calls = "", []
    for delta in deltas:
        match delta:
            case Content(text):
                content += text
            case CallStart(index, identity, name):
                assert index == len(calls)
                assert identity
                calls.append((name, ""))
            case Arguments(index, text):
                assert text
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    assert parser.calls == len(calls)
    return content, calls


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(len(text) + 1), rng.randrange(min(len(text), 12) + 1)))
    return [text[a:z] for a, z in itertools.pairwise([0, *places, len(text)])]


ODD = "世界\n\\\"'</tool_call>{}[]<tool_call>[TOOL_CALLS]" + b + "```\u3000😀\t"
json_text = st.builds(
    json.dumps,
    st.dictionaries(
        st.text(max_size=6),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just(ODD),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=3,
    ),
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
calls_made = st.lists(st.tuples(st.sampled_from(NAMES), json_text), min_size=1, max_size=3)


@given(form=st.sampled_from(sorted(SHAPES)), calls=calls_made, seed=st.integers(0, 10**6))
def test_calls_come_out_as_written_however_cut(form, calls, seed):
    text = written(form, calls)
    assert parse(form, [text]) == ("", calls)
    assert parse(form, list(text)) == ("", calls)
    assert parse(form, cut(text, random.Random(seed))) == ("", calls)


@given(form=st.sampled_from(sorted(set(SHAPES) - {"llama"})), calls=calls_made, seed=st.integers(0, 10**6))
def test_text_before_and_behind_is_content(form, calls, seed):
    text = f"Let me see — 我看看。\n\n{written(form, calls)}\nDone < 完成 [x]"
    expected = ("Let me see — 我看看。\nDone < 完成 [x]", calls)
    assert parse(form, cut(text, random.Random(seed))) == expected


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<tool",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[",
    "]",
    "{",
    "}",
    '{"name": "f"',
]
PIECES += [
    '"arguments": ',
    '"parameters"',
    ":",
    ",",
    ' "',
    "\\",
    "f",
    "{}",
    '{"a": 1}',
    "\n",
    " ",
    "世",
    B,
    b,
    s,
    e,
    E,
    ";",
]
PIECES += [
    "<|python_tag|>",
    "function",
    "```json\n",
    "```",
    "null",
    "<",
    '{"name": "f", "arguments": {"a": "世',
    "\u3000",
]


@given(
    form=st.sampled_from(sorted(SHAPES)), parts=st.lists(st.sampled_from(PIECES), max_size=14), seed=st.integers(0, 99)
)
@example(form="hermes", parts=['{"name": "f"', ",", ","], seed=0)
def test_no_text_breaks_it_and_cuts_never_matter(form, parts, seed):
    text = "".join(parts)
    whole = parse(form, [text])
    assert parse(form, list(text)) == whole
    assert parse(form, cut(text, random.Random(seed))) == whole
    if not whole[1]:
        assert whole[0] == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "a <tool_call> is what starts a call\n"),
        ("hermes", '<tool_call>{"title": "x"}</tool_call>'),
        ("hermes", "1 < 2 and <tool"),
        ("llama", '{"title": "狐狸", "name": "f", "parameters": {}}'),
        ("llama", '{"name": "Bob", "parameters": {}}'),  # no such tool
        ("llama", 'See {"name": "f", "parameters": {}}'),
        ("llama", '<|python_tag|>brave_search.call(query="世界")'),
        ("mistral", "[TOOL_CALLS] [1, 2]"),
        ("mistral-args", "[TOOL_CALLS] and then nothing"),
        ("deepseek", f"{B} no call"),
        ("hermes", "  \n"),
    ],
)
def test_what_only_looks_like_a_call_stays_content(form, text):
    assert parse(form, [text]) == (text, [])
    assert parse(form, list(text)) == (text, [])


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"城\\": 1}"}</tool_call>', [("f", '{"城": 1}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call>\n', [("f", "{}")]),
        ("hermes", '<tool_call>{"id": 3, "name": "\\u67e5", "arguments": {"a": [', [("查", '{"a": [')]),  # cut short
        ("llama", '<|python_tag|>{"type": "function", "name": "g", "parameters": {"a": "}"}}', [("g", '{"a": "}"}')]),
        ("mistral-args", '[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{"a": 1}', [("f", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', [("f", '{"a": 1}')]),
        ("deepseek", f'{b}function{s}f\n```json\n{{"a": 1}}\n```{e}', [("f", '{"a": 1}')]),
    ],
)
def test_variants_that_models_write_are_understood(form, text, calls):
    assert parse(form, [text]) == ("", calls)
    assert parse(form, list(text)) == ("", calls)


def test_what_follows_a_bare_object_is_content():
    assert parse("llama", list('{"name": "f", "parameters": {}}; 然后 {}')) == ("; 然后 {}", [("f", "{}")])
    assert parse("deepseek", list(f"{b}f{s}{{}}{e} {b}好")) == (f" {b}好", [("f", "{}")])
    assert parse("mistral", list('[TOOL_CALLS][{"name": "f", "arguments": {}}, 世]')) == ("世]", [("f", "{}")])


def test_arguments_flow_while_they_are_written():
    parser = ToolParser(ToolFormat("hermes"), new_id=iter("ab").__next__)
    assert parser.push("Hm. <tool") == [Content("Hm.")]
    assert parser.push('_call>\n{"name": "f", "arguments":') == []
    assert parser.push(' {"城') == [CallStart(0, "a", "f"), Arguments(0, '{"城')]
    assert parser.push('": "北京"') == [Arguments(0, '": "北京"')]
    assert parser.push("}}\n</tool_call>\n") == [Arguments(0, "}")]
    assert parser.push("Done") == [Content("\nDone")]
    assert parser.finish() == []


def test_ids_have_the_shape_that_templates_want():
    def identity(form: str) -> str:
        deltas = ToolParser(ToolFormat(form)).push(written(form, [("f", "{}")]) + " ")
        return next(delta.id for delta in deltas if isinstance(delta, CallStart))

    assert re.fullmatch(r"call_[0-9a-f]{24}", identity("hermes"))
    assert re.fullmatch(r"[0-9a-zA-Z]{9}", identity("mistral"))
    assert identity("hermes") != identity("hermes")


# Which format a model writes, and making it write one.

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"$ref": "#/$defs/city"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"city": {"enum": ["北京", "Paris"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "查天气"}},
]
CALL_LOOP = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}BODY{% endfor %}{% endfor %}"
NAME, OBJECT = "{{ c.function.name }}", "{{ c.function.arguments | tojson }}"
JSON_CALL = f'{{"name": "{NAME}", "KEY": {OBJECT}}}'
TEMPLATES: dict[str, str] = {
    "hermes": "<tool_call>\n" + JSON_CALL.replace("KEY", "arguments") + "\n</tool_call>",
    "llama": JSON_CALL.replace("KEY", "parameters"),
    "mistral": "[TOOL_CALLS] [" + JSON_CALL.replace("KEY", "arguments") + "]",
    "mistral-args": f"[TOOL_CALLS]{NAME}[ARGS]{OBJECT}",
    "deepseek": f"{B}{b}function{s}{NAME}\n```json\n{{{{ '' + c.function.arguments }}}}\n```{e}{E}",
    "deepseek-plain": f"{B}{b}{NAME}{s}{{{{ '' + c.function.arguments }}}}{e}{E}",
}
SPECIAL = {
    "hermes": [],
    "llama": ["<|python_tag|>"],
    "mistral": ["[TOOL_CALLS]"],
    "mistral-args": ["[TOOL_CALLS]", "[ARGS]"],
}


def tokenizer_of(form: str, template: str | None, folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.train_from_iterator(
        ['{"name": "get_weather", "arguments": {"city": "北京"}} 查天气 Paris days'] * 9,
        vocab_size=340,
        special=SPECIAL.get(form, [B, E, b, s, e]),
    )
    tokenizer.save(folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(folder)


def allowed(mask: torch.Tensor) -> list[int]:
    return [32 * word + bit for word, ones in enumerate(mask.tolist()) for bit in range(32) if ones >> bit & 1]


@pytest.mark.parametrize("form", sorted(SHAPES))
def test_the_template_tells_the_format(form, tmp_path):
    found = format_of(tokenizer_of(form, CALL_LOOP.replace("BODY", TEMPLATES[form]), tmp_path))
    assert found is not None
    assert found.name == form
    assert [marker for marker, _ in found.special] == SPECIAL.get(form, [B, b, s, e, E])


def test_special_tokens_tell_where_the_template_does_not(tmp_path):
    assert format_of(tokenizer_of("mistral", None, tmp_path)).name == "mistral"
    assert format_of(tokenizer_of("llama", "{{ messages[0].content }}", tmp_path)).name == "llama"
    assert format_of(tokenizer_of("hermes", "{{ messages[0].content }}", tmp_path)) is None


def is_valid(call: tuple[str, str]) -> bool:
    name, arguments = call[0], json.loads(call[1])
    if name == "查天气":
        return arguments == {}
    return arguments["city"] in ("北京", "Paris") and arguments.get("days", 1) in range(1, 10) and name == "get_weather"


@pytest.mark.parametrize("form", sorted(SHAPES))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_answer_is_valid_calls(form, choice, parallel, tmp_path):
    tokenizer = tokenizer_of(form, CALL_LOOP.replace("BODY", TEMPLATES[form]), tmp_path)
    found = format_of(tokenizer)
    constraint = constraint_for(TOOLS, choice, found, parallel=parallel)
    constraints = Constraints(tokenizer, tokenizer.size, frozenset(tokenizer.stop_ids))
    drawn = set()
    for seed in range(6):
        rng, matcher, ids = random.Random(seed), constraints.compile(constraint), []
        while not ids or ids[-1] not in tokenizer.stop_ids:
            choices = allowed(matcher.mask())
            ends = [token for token in choices if token in tokenizer.stop_ids]
            ids.append(ends[0] if ends and rng.random() < 0.5 else rng.choice(choices))
            matcher.accept(ids[-1])
        parser = ToolParser(found, names=[tool["function"]["name"] for tool in TOOLS])
        text = tokenizer.decode_bytes(ids[:-1]).decode()
        content, calls = parse_with(parser, text)
        assert content == ""
        assert calls
        assert parallel or len(calls) == 1
        assert all(map(is_valid, calls)), text
        drawn |= {name for name, _ in calls}
    assert drawn == ({"get_weather", "查天气"} if choice == "required" else {"get_weather"})


def parse_with(parser: ToolParser, text: str) -> tuple[str, list[tuple[str, str]]]:
    deltas = parser.push(text) + parser.finish()
    starts = [delta for delta in deltas if isinstance(delta, CallStart)]
    pieces = [delta for delta in deltas if isinstance(delta, Arguments)]
    calls = [(start.name, "".join(piece.text for piece in pieces if piece.index == start.index)) for start in starts]
    return "".join(delta.text for delta in deltas if isinstance(delta, Content)), calls


def test_free_choice_needs_no_constraint_and_a_bad_one_is_refused():
    form = ToolFormat("hermes")
    assert all(constraint_for(TOOLS, choice, form) is None for choice in ("auto", "none", None))
    with pytest.raises(HanlinError, match="'g', which is not among `tools` \\('get_weather', '查天气'\\)"):
        constraint_for(TOOLS, {"type": "function", "function": {"name": "g"}}, form)
    with pytest.raises(HanlinError, match="there are no `tools`"):
        constraint_for([], "required", form)
    with pytest.raises(HanlinError, match="expected none, auto, required"):
        constraint_for(TOOLS, "always", form)
