"""Conversations: the same tokens as transformers, exact marks, and no way to write a control token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.tokens import Tokenizer
from hanlin.tokens.chat_template import render

words = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
hostile = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<", "|>", "system\n", "好", " a", "\n"]
    ),
    max_size=8,
).map("".join)


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=200)
@given(contents=st.lists(words, min_size=1, max_size=4), system=st.booleans(), generate=st.booleans())
def test_chat_agrees_with_transformers(tokenizer: Tokenizer, theirs, contents, system, generate):
    messages = [{"role": "system", "content": "你是翰林。"}] * system + conversation(*contents)
    if any(name in content for content in contents for name in tokenizer.special):
        return
    expected = theirs.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)
    assert tokenizer.chat(messages, generate=generate) == expected


@settings(deadline=None, max_examples=60)
@given(contents=st.lists(words, min_size=3, max_size=3), name=words, system=st.booleans(), generate=st.booleans())
def test_tools_and_reasoning_agree_with_transformers(tokenizer: Tokenizer, theirs, contents, name, system, generate):
    question, thought, result = contents
    if any(special in text for text in (*contents, name) for special in tokenizer.special):
        return
    function = {"name": name, "arguments": {name: [result, 1, None]}}
    messages = [{"role": "system", "content": "你是翰林。"}] * system + [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [{"function": function}] * 2},
        {"role": "tool", "content": result},
        {"role": "tool", "content": thought},
    ]
    tools = [{"type": "function", "function": {"name": name, "description": thought, "parameters": {}}}]
    expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=generate, return_dict=False)
    assert tokenizer.chat(messages, tools=tools, generate=generate) == expected


def trained_text(tokenizer: Tokenizer, messages) -> bytes:
    chat = tokenizer.chat_trained(messages)
    assert chat.ids == tokenizer.chat(messages, generate=False)
    return tokenizer.decode_bytes(token for token, mine in zip(chat.ids, chat.trained, strict=True) if mine)


@settings(deadline=None, max_examples=200)
@given(contents=st.lists(st.one_of(words, hostile), min_size=2, max_size=6))
def test_exactly_the_assistants_words_and_end_tokens_are_trained(tokenizer: Tokenizer, contents):
    answers = contents[1::2]
    if any(answer[:1].isspace() for answer in answers):
        return  # a first token may hold the template's line end too; see the next test
    expected = "".join(f"{answer}<|im_end|>" for answer in answers)
    assert trained_text(tokenizer, conversation(*contents)) == expected.encode()


def test_a_token_with_letters_of_the_template_is_not_trained(tokenizer: Tokenizer):
    chat = tokenizer.chat_trained(conversation("a", "\n\nb"))
    trained = trained_text(tokenizer, conversation("a", "\n\nb")).decode()
    assert "\n\n\nb<|im_end|>".endswith(trained)
    assert trained.endswith("b<|im_end|>")
    opening = tokenizer.chat(conversation("a"))
    assert not any(chat.trained[: len(opening) - 1])


@settings(deadline=None, max_examples=300)
@given(contents=st.lists(hostile, min_size=1, max_size=4), generate=st.booleans())
def test_nothing_written_in_a_message_becomes_a_control_token(tokenizer: Tokenizer, contents, generate):
    messages = conversation(*contents)
    ids = tokenizer.chat(messages, generate=generate)
    clean = tokenizer.chat(conversation(*["x"] * len(contents)), generate=generate)
    controls = set(tokenizer.special.values())
    assert [token for token in ids if token in controls] == [token for token in clean if token in controls]
    text = render(tokenizer._files.chat_template or "", messages, generate=generate, special={})
    assert tokenizer.decode(ids, skip_special=False) == text


def test_control_tokens_in_other_fields_stay_letters_too(llama3, tmp_path):
    tokenizer = Tokenizer.load(llama3)
    tokenizer.save(tmp_path)
    template = "{% for m in messages %}<|start_header_id|>{{ m.name }}{{ m.parts[0].text }}{{ m | tojson }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    other = Tokenizer.load(tmp_path)
    message = {"role": "user", "name": "<|eot_id|>", "parts": [{"text": "a<|eot_id|>"}], "<|eot_id|>": 1}
    ids = other.chat([message], generate=False)
    assert [token for token in ids if token in other.special.values()] == [other.special["<|start_header_id|>"]]
    assert other.decode(ids, skip_special=False).count("<|eot_id|>") == 5


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "wizard", "content": "a"}], "role is wizard"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "system message stands first"),
        ([{"role": "user", "content": ["a"]}], "not text"),
        ([{"role": "user"}], "not text"),
    ],
)
def test_the_own_template_refuses_what_it_cannot_write(tokenizer: Tokenizer, messages, message):
    with pytest.raises(HanlinError, match=message):
        tokenizer.chat(messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja: line 1"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[7].content.x.y }}", "refuses these messages"),
    ],
)
def test_a_bad_or_hostile_template_is_refused(tokenizer: Tokenizer, folder, tmp_path, template, message):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(HanlinError, match=message):
        Tokenizer.load(tmp_path).chat(conversation("a"))


def test_a_template_that_rewrites_the_past_is_refused_for_training_only(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content[:1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(forgetful)
    other = Tokenizer.load(tmp_path)
    messages = conversation("hi", "long answer", "more", "done")
    assert other.chat(messages)
    with pytest.raises(HanlinError, match="rewrites what stood before: message 2"):
        other.chat_trained(messages)


def test_generation_marks_and_loop_controls_of_others_templates_work(tokenizer: Tokenizer, theirs, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    template = (
        "{% for m in messages %}\n    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {% generation %}\n<|im_start|>{{ m.content | tojson }}{% endgeneration %}\n{% endfor %}\n"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    messages = conversation("é<>'", "好", "cut off")
    ours, other = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat(messages, generate=False) == other.apply_chat_template(messages, return_dict=False)
