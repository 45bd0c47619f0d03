"""Three formats read alike; a row that cannot be read is named with what was found and what was expected."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from hanlin.align.conversations import Message, read_conversations
from hanlin.core.errors import HanlinError

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "sft"

EXPECTED = (
    Message("system", "你是翰林。"),
    Message("user", "1+1=?"),
    Message("assistant", "2"),
    Message("user", "为什么？"),
    Message("assistant", "Because 一加一等于二."),
)
ALPACA = {
    "instruction": "为什么？",
    "input": "",
    "output": "Because 一加一等于二.",
    "system": "你是翰林。",
    "history": [["1+1=?", "2"]],
}
SHAREGPT = {
    "id": "x7",
    "system": "你是翰林。",
    "conversations": [
        {"from": "human", "value": "1+1=?"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "为什么？"},
        {"from": "gpt", "value": "Because 一加一等于二."},
    ],
}
OPENAI = {"messages": [{"role": m.role, "content": m.content} for m in EXPECTED]}
PARTS = {"messages": [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in EXPECTED]}


def write(folder: Path, rows: list, name: str = "rows.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def read_one(folder: Path, row: object):
    (conversation,) = read_conversations([write(folder, [row])]).conversations
    return conversation


def refusal(folder: Path, *rows: object) -> str:
    with pytest.raises(HanlinError) as error:
        read_conversations([write(folder, list(rows))])
    return str(error.value)


@pytest.mark.parametrize("row", [ALPACA, SHAREGPT, OPENAI, PARTS], ids=["alpaca", "sharegpt", "openai", "parts"])
def test_every_format_gives_the_same_conversation(tmp_path, row):
    conversation = read_one(tmp_path, row)
    assert conversation.messages == EXPECTED
    assert conversation.name == "rows.json:1"
    assert conversation.plain()[0] == {"role": "system", "content": "你是翰林。"}


def test_json_lines_gz_zst_and_parquet_read_like_the_json_array(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in (OPENAI, OPENAI)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + lines)  # lines in a .json, behind a byte-order mark
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    files = sorted(tmp_path.iterdir())
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([OPENAI, OPENAI]), tmp_path / "e.parquet")
    files.append(tmp_path / "e.parquet")
    read = read_conversations(files).conversations
    assert [c.messages for c in read] == [EXPECTED] * 10
    assert [c.name for c in read[:2]] == ["a.jsonl:1", "a.jsonl:3"]  # the line's number, blank lines counted


def test_alpaca_input_follows_the_instruction(tmp_path):
    row = {"instruction": "翻译成英文", "input": "你好", "output": "Hello"}
    assert read_one(tmp_path, row).messages[0].content == "翻译成英文\n你好"
    assert read_one(tmp_path, {"instruction": "Hi", "output": "Hello"}).messages[0].content == "Hi"


def test_weight_zero_marks_a_turn_as_read_but_not_trained(tmp_path):
    turns = [
        {"role": "user", "content": "a", "loss_weight": 0.0},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "loss_weight": 1.0},
    ]
    assert [m.trained for m in read_one(tmp_path, {"messages": turns}).messages] == [True, False, True, True]
    turns[1]["weight"] = 0.5
    assert "`weight` is 0.5" in refusal(tmp_path, {"messages": turns})


def test_a_question_without_an_answer_at_the_end_is_left_out(tmp_path):
    turns = [*SHAREGPT["conversations"], {"from": "human", "value": "谢谢"}]
    assert read_one(tmp_path, {**SHAREGPT, "conversations": turns}).messages == EXPECTED


def says(role: str, content: object) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "found", "expected"),
    [
        ("just text", "is a JSON string", "Expected Alpaca"),
        ({"text": "a"}, "the columns `text`", "Expected Alpaca"),
        ({"messages": [{"speaker": "a"}]}, "the keys `speaker`", "ShareGPT"),
        ({"messages": "hi"}, "the columns `messages`", "Expected Alpaca"),
        ({"messages": [says("wizard", "a")]}, "unknown role 'wizard'", "expected one of assistant, bot"),
        ({"messages": [says("user", "a"), says("assistant", "  ")]}, "turn 2: the assistant's turn is empty", ""),
        ({"messages": [says("user", "a"), says("assistant", None)]}, "turn 2: `content` is a JSON null", "text"),
        ({"messages": [says("user", "a")]}, "no turn of the assistant", ""),
        ({"messages": [says("user", "a"), "b"]}, "turn 2 is a JSON string", '"role", "content"'),
        ({"messages": [says("user", "a"), says("tool", "b")]}, "turn 2 is the result of a tool", "no call waits"),
        ({"messages": [says("user", [{"type": "image_url"}])]}, "type image_url", "only text"),
        ({"messages": [says("assistant", "a"), says("system", "b"), says("assistant", "c")]}, "turn 2", "first turn"),
        ({**OPENAI, "system": "b"}, "both in `system` and in its turns", ""),
        ({**OPENAI, "images": ["a.png"]}, "has `images`", "text turns only"),
        ({"instruction": "", "output": "b"}, "both empty", ""),
        ({"instruction": "a", "output": ""}, "turn 2: the assistant's turn is empty", ""),
        ({"instruction": "a", "output": "b\ud83d"}, "`output` holds half a character (the lone surrogate U+D83D)", ""),
        ({"instruction": 3, "output": "b"}, "`instruction` is a JSON number", "expected text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "`history`", "[question, answer]"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_what_was_found_and_expected(tmp_path, row, found, expected):
    message = refusal(tmp_path, row)
    assert f"{tmp_path / 'rows.json'}, row 1" in message
    assert found in message
    assert expected in message


def test_rows_must_keep_to_the_format_of_the_first(tmp_path):
    assert "row 2" in (message := refusal(tmp_path, ALPACA, OPENAI)) and "began as Alpaca" in message
    assert "row 2" in (message := refusal(tmp_path, OPENAI, ALPACA)) and "list of turns" in message


def test_bad_rows_can_be_skipped_and_are_listed(tmp_path):
    bad = {"messages": [says("wizard", "a")]}
    reading = read_conversations([write(tmp_path, [OPENAI, bad, OPENAI])], bad_rows="skip")
    assert [c.name for c in reading.conversations] == ["rows.json:1", "rows.json:3"]
    assert len(reading.skipped) == 1 and "row 2" in reading.skipped[0]
    with pytest.raises(HanlinError, match=r"Every row was skipped; the first: .*row 1.*wizard"):
        read_conversations([write(tmp_path, [bad, bad])], bad_rows="skip")


def test_files_that_are_no_rows_at_all_are_explained(tmp_path):
    broken = tmp_path / "broken.jsonl"
    for content, words in [
        (b'{"messages": []}\n{"mess', "line 2 is not valid JSON"),
        (b"[1, 2", "is not valid JSON"),
        (b"", "no rows"),
        (b"[]", "no rows"),
        ("你好".encode("gb18030"), "is not UTF-8: byte 0"),
    ]:
        broken.write_bytes(content)
        with pytest.raises(HanlinError, match=words):
            read_conversations([broken], bad_rows="skip")
    with pytest.raises(HanlinError, match="does not exist"):
        read_conversations([tmp_path / "absent.json"])


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the public sample files are not here")
def test_published_files_are_read_whole():
    counts = {"alpaca_en_demo.json": 999, "alpaca_zh_demo.json": 1000, "identity.json": 91, "v1_sft_demo.jsonl": 500}
    for name, count in counts.items():
        assert len(read_conversations([SAMPLES / name]).conversations) == count


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the public sample files are not here")
def test_published_tool_conversations_keep_every_call_and_every_result():
    """Counted from the raw files; two Chinese rows hold a result that answers no call, and are refused by name."""
    for name, skipped in (("glaive_toolcall_en_demo.json", 0), ("glaive_toolcall_zh_demo.json", 2)):
        reading = read_conversations([SAMPLES / name], bad_rows="skip")
        assert len(reading.skipped) == skipped and all("no call waits" in line for line in reading.skipped)
        left = {int(conversation.name.split(":")[1]) for conversation in reading.conversations}
        raw = [row for number, row in enumerate(json.loads((SAMPLES / name).read_text()), start=1) if number in left]
        turns = [turn["from"] for row in raw for turn in row["conversations"]]
        messages = [message for conversation in reading.conversations for message in conversation.messages]
        assert sum(len(message.calls) for message in messages) == turns.count("function_call") > 200
        assert sum(message.role == "tool" for message in messages) == turns.count("observation") > 200
        assert [len(c.tools) for c in reading.conversations] == [len(json.loads(row["tools"])) for row in raw]
    reasoned = read_conversations([SAMPLES / "reason_tool_use_demo_50.jsonl"]).conversations
    answers = [message for c in reasoned for message in c.messages if message.role == "assistant"]
    assert len(reasoned) == 50 and len(answers) == 112 and all(message.reasoning for message in answers)
    assert sum(len(message.calls) for message in answers) == 41 + 2 * 9 + 3 * 3
