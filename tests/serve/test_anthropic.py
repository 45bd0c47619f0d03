"""POST /v1/messages as Anthropic's own client sees it."""

import json

import pytest
from tests.serve.tiny import post

from hanlin.serve.errors import anthropic_body, error_body

anthropic = pytest.importorskip("anthropic")

ASK = {"model": "tiny", "max_tokens": 12, "messages": [{"role": "user", "content": "读和写 fox"}]}
FIXED = {"temperature": 0.0}
TOOL = {
    "name": "pick",
    "description": "选一个城市",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["北京", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
FORCED = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 200}


@pytest.fixture
def claude(address):
    with anthropic.Anthropic(base_url=address, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def ask(claude, **changes):
    return claude.messages.create(**{**ASK, "extra_body": FIXED, **changes})


def test_a_message_is_the_chat_answer(claude, client):
    message = ask(claude)
    chat = client.chat.completions.create(model="tiny", messages=ASK["messages"], temperature=0, max_tokens=12)
    assert message.content[0].text == chat.choices[0].message.content
    assert message.role == "assistant" and message.stop_reason in ("max_tokens", "end_turn")
    assert message.usage.output_tokens == chat.usage.completion_tokens


def test_cached_tokens_are_counted_beside_the_others(claude):
    long = [{"role": "user", "content": "读和写是一枚硬币的两面。" * 8}]
    whole = claude.messages.count_tokens(model="tiny", messages=long).input_tokens
    for _ in range(2):
        usage = ask(claude, messages=long).usage
        assert usage.input_tokens + usage.cache_read_input_tokens == whole
    assert usage.cache_read_input_tokens > 0


def test_streamed_blocks_tell_the_same_story(claude, address):
    whole = ask(claude)
    with claude.messages.stream(**ASK, extra_body=FIXED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    lines = post(address, "/v1/messages", ASK | FIXED | {"stream": True}).text.splitlines()
    kinds = [json.loads(line[6:])["type"] for line in lines if line.startswith("data: ")]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_a_stop_sequence_is_named(claude):
    whole = ask(claude).content[0].text
    message = ask(claude, stop_sequences=[whole[3:5]])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == whole[3:5]
    assert message.content[0].text == whole[: whole.index(whole[3:5])]


def test_system_and_blocks_are_read(claude, engine):
    turns = [{"role": "system", "content": "Be brief."}, *ASK["messages"]]
    expected = len(engine.tokenizer.chat(turns))
    for system in ("Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]):
        counted = claude.messages.count_tokens(model="tiny", messages=ASK["messages"], system=system)
        assert counted.input_tokens == expected
    blocks = [{"role": "user", "content": [{"type": "text", "text": "读和写 fox"}]}]
    assert ask(claude, messages=blocks).content[0].text == ask(claude).content[0].text


def test_the_last_turn_of_the_assistant_is_continued(claude, engine):
    begun = [*ASK["messages"], {"role": "assistant", "content": "The quick"}]
    counted = claude.messages.count_tokens(model="tiny", messages=begun)
    expected = engine.tokenizer.chat(ASK["messages"]) + engine.tokenizer.encode("The quick")
    assert counted.input_tokens == len(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_used_and_answered(claude, stream):
    if stream:
        with claude.messages.stream(**{**ASK, **FORCED}, extra_body=FIXED) as running:
            message = running.get_final_message()
    else:
        message = ask(claude, **FORCED)
    assert message.stop_reason == "tool_use"
    [use] = [block for block in message.content if block.type == "tool_use"]
    assert use.name == "pick" and use.input["city"] in ("北京", "Paris")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "晴"}]}
    turns = [*ASK["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert ask(claude, messages=turns, tools=[TOOL]).content
    named = ask(claude, **FORCED | {"tool_choice": {"type": "tool", "name": "pick", "disable_parallel_tool_use": True}})
    assert named.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice"),
        ({"colour": 1}, "colour"),
    ],
    ids=str,
)
def test_mistakes_leave_in_anthropics_form(address, change, part):
    response = post(address, "/v1/messages", ASK | change)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert part in body["error"]["message"]


def test_the_client_raises_its_own_errors(claude):
    with pytest.raises(anthropic.NotFoundError, match="'tiny'"):
        ask(claude, model="claude")
    with pytest.raises(anthropic.BadRequestError, match="context"):
        ask(claude, max_tokens=100_000)


def test_overload_has_anthropics_word():
    assert anthropic_body(503, error_body("x", status=503))["error"]["type"] == "overloaded_error"
    assert anthropic_body(429, error_body("x", status=429))["error"]["type"] == "rate_limit_error"
