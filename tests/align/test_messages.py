"""Calls of tools, their results and reasoning: one meaning in every spelling, and what does not fit is refused."""

import json

import pytest

from hanlin.align.conversations import read_conversations
from hanlin.align.messages import Conversation, Message, ToolCall
from hanlin.core.errors import HanlinError

WEATHER = {"name": "weather", "description": "天气", "parameters": {"type": "object", "properties": {"city": {}}}}
OSLO, BERGEN = ({"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Bergen"))
FIRST, SECOND = ToolCall("weather", {"city": "Oslo"}, "call00001"), ToolCall("weather", {"city": "Bergen"}, "call00002")
EXPECTED = Conversation(
    (
        Message("user", "挪威的天气？"),
        Message("assistant", "I look it up.", reasoning="两个城市", calls=(FIRST, SECOND)),
        Message("tool", "7", answers=FIRST),
        Message("tool", "5", answers=SECOND),
        Message("assistant", "Oslo 7, Bergen 5"),
    ),
    "rows.json:1",
    ({"type": "function", "function": WEATHER},),
)


def says(role: str, content: object, **more) -> dict:
    return {"role": role, "content": content, **more}


def called(function: dict, **more) -> dict:
    return {"type": "function", "function": {**function, "arguments": json.dumps(function["arguments"])}, **more}


START, END = says("user", "挪威的天气？"), says("assistant", "Oslo 7, Bergen 5")
RESULTS = [says("tool", "7"), says("tool", [{"type": "text", "text": "5"}])]
OPENAI = {
    "tools": [{"type": "function", "function": WEATHER}],
    "messages": [
        START,
        says("assistant", "I look it up.", reasoning_content="两个城市", tool_calls=[called(OSLO), called(BERGEN)]),
        *RESULTS,
        END,
    ],
}
PARTS = {
    "tools": json.dumps([WEATHER]),
    "messages": [
        START,
        says(
            "assistant",
            [
                {"type": "reasoning", "value": "两个城市"},
                {"type": "text", "value": "I look it up."},
                *({"type": "tool_call", "value": json.dumps(call)} for call in (OSLO, BERGEN)),
            ],
        ),
        *RESULTS,
        END,
    ],
}
SYSTEM_TOOLS = {"messages": [says("system", "", tools=[WEATHER]), *OPENAI["messages"]]}


@pytest.fixture
def read(tmp_path):
    def one(row: dict, name: str = "rows.json") -> Conversation:
        (tmp_path / name).write_text(json.dumps([row]))
        (conversation,) = read_conversations([tmp_path / name]).conversations
        return conversation

    return one


@pytest.mark.parametrize("row", [OPENAI, PARTS], ids=["tool_calls", "parts"])
def test_every_spelling_of_calls_gives_the_same_conversation(read, row):
    assert read(row) == EXPECTED


def test_sharegpt_calls_belong_to_what_was_said_before_them(read):
    turns = [
        ("human", "挪威的天气？"), ("gpt", "I look it up."), ("function_call", json.dumps([OSLO, BERGEN])),
        ("observation", "7"), ("observation", "5"), ("gpt", "Oslo 7, Bergen 5"),
    ]  # fmt: skip
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps([WEATHER])}
    first, second, *rest = EXPECTED.messages
    told = Message("assistant", second.content, calls=second.calls)
    assert read(row) == Conversation((first, told, *rest), "rows.json:1", EXPECTED.tools)


def test_tools_may_be_declared_in_the_system_turn_and_only_once(read):
    assert read(SYSTEM_TOOLS).tools == EXPECTED.tools
    with pytest.raises(HanlinError, match="declares tools in several places"):
        read({**SYSTEM_TOOLS, "tools": [WEATHER]})


def test_results_find_their_call_by_id_whatever_their_order(read):
    calls = [called(OSLO, id="abc"), called(BERGEN, id="xyz")]
    results = [says("tool", "5", tool_call_id="xyz"), says("tool", "7", tool_call_id="abc")]
    conversation = read({"messages": [START, says("assistant", None, tool_calls=calls), *results, END]})
    assert [m.answers.arguments["city"] for m in conversation.messages if m.answers] == ["Bergen", "Oslo"]
    plain = conversation.plain()
    assert plain[1]["content"] == "" and [call["id"] for call in plain[1]["tool_calls"]] == ["abc", "xyz"]
    assert plain[2] == {"role": "tool", "content": "5", "tool_call_id": "xyz", "name": "weather"}


def test_the_dialects_of_templates_are_spelled_from_the_same_messages():
    plain = EXPECTED.plain(arguments_as_text=True, reasoning_key="thinking")
    assert plain[1]["thinking"] == "两个城市" and "reasoning_content" not in plain[1]
    assert plain[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    assert EXPECTED.plain()[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert plain[0] == {"role": "user", "content": "挪威的天气？"}


def test_what_a_parquet_table_fills_up_with_null_is_no_argument(tmp_path):
    """One schema for all rows: each call has the keys of every other call."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    calls = [[{"function": {"name": "f", "arguments": a}}] for a in ({"city": "Oslo"}, {"day": "Monday"})]
    rows = [{"messages": [START, says("assistant", "", tool_calls=call)]} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = read_conversations([tmp_path / "rows.parquet"]).conversations
    assert [c.messages[1].calls[0].arguments for c in read] == [{"city": "Oslo"}, {"day": "Monday"}]


def test_a_null_that_was_written_in_json_stays(read):
    call = {"name": "f", "arguments": {"city": None}}
    conversation = read({"messages": [START, says("assistant", "", tool_calls=[call])]})
    assert conversation.messages[1].calls[0].arguments == {"city": None}


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([says("assistant", "", tool_calls=[{"arguments": {}}])], 'a tool call is {"arguments": {}}'),
        ([says("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])], "the arguments of f is no JSON"),
        ([says("assistant", "", tool_calls=[{"name": "f", "arguments": [1]}])], "the arguments of the call of f are"),
        ([says("assistant", "", tool_calls=[{"name": "f", "arguments": {"a": "\ud83d"}}])], "half a character"),
        ([says("function_call", "look it up")], "a tool call is no JSON"),
        ([says("function_call", "[]")], "the list of tool calls is empty"),
        ([says("assistant", "", tool_calls=[OSLO]), says("tool", "1", tool_call_id="zzz"), END], "with the id 'zzz'"),
        ([says("assistant", "", tool_calls=[OSLO]), says("tool", "1"), says("tool", "2"), END], "turn 4 is the result"),
        ([says("assistant", "", tool_calls=[OSLO]), says("user", "?"), says("tool", "1"), END], "turn 4 is the result"),
        ([says("assistant", "", reasoning_content="only thoughts")], "turn 2: the assistant's turn is empty"),
    ],
)
def test_what_does_not_fit_together_is_refused(read, turns, found):
    with pytest.raises(HanlinError) as error:
        read({"messages": [START, *turns]})
    assert "rows.json, row 1, turn" in str(error.value) and found in str(error.value)


@pytest.mark.parametrize("tools", ["[{", [{"description": "x"}], [3]])
def test_declarations_without_a_name_are_refused(read, tools):
    with pytest.raises(HanlinError, match=r"row 1: (`tools` is no JSON|a tool is declared as)"):
        read({**OPENAI, "tools": tools})
