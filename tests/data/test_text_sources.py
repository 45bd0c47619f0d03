"""Documents from files: every format gives the same text, every mistake its place."""

import gzip
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core import text_sources
from hanlin.core.errors import HanlinError
from hanlin.core.text_sources import Document, find_files, read_documents, read_texts, size_on_disk

TEXTS = ["Hello\r\nworld  ", "你好,世界\n\n第二段", "emoji 👩‍👧 \u2028 end"]


@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
def test_every_format_gives_the_same_documents(tmp_path, pack):
    import pyarrow as pa
    import pyarrow.parquet as pq

    packers = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    rows = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    contents = {
        "rows.jsonl": rows,
        "rows.json": json.dumps([{"text": text} for text in TEXTS]),
        "cut.txt": "§§".join(TEXTS),
    }
    for name, content in contents.items():
        (tmp_path / (name + pack)).write_bytes(packers[pack](content.encode()))
        found = list(read_documents([tmp_path / (name + pack)], separator="§§"))
        assert [document.text for document in found] == TEXTS
        assert [document.name for document in found] == [f"{tmp_path / (name + pack)}:{i}" for i in (1, 2, 3)]
    pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), tmp_path / "rows.parquet", row_group_size=2)
    assert [document.text for document in read_documents([tmp_path / "rows.parquet"])] == TEXTS
    (tmp_path / ("whole.txt" + pack)).write_bytes(packers[pack](b"\xef\xbb\xbf" + TEXTS[0].encode()))
    (whole,) = read_documents([tmp_path / ("whole.txt" + pack)])
    assert whole == Document(str(tmp_path / ("whole.txt" + pack)), TEXTS[0])


def test_conversations_give_all_that_is_said(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "你好", "input": "", "output": "Hello"},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [document.text for document in read_documents([file])] == ["你好\nHello"] * 3
    assert list(read_texts([file])) == ["你好\nHello"] * 3


def test_a_folder_is_walked_in_the_order_of_names_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/x.txt", "a/c.bin", "c.jsonl.gz", "B.TXT"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [str(file.relative_to(tmp_path)) for file in find_files([tmp_path])]
    assert found == sorted(found)
    assert set(found) == {"b.txt", "a/z.md", "c.jsonl.gz", "B.TXT"}


@settings(deadline=None)
@given(text=st.text(alphabet="ab§好\n", max_size=300), size=st.integers(1, 9))
def test_streaming_in_any_pieces_cuts_at_the_same_separators(tmp_path_factory, text, size):
    file = tmp_path_factory.mktemp("stream") / "text.txt"
    file.write_bytes(text.encode())
    for separator in ("§", "§§", "\n", "ab"):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert list(text_sources._split(pieces, separator)) == text.split(separator)


def test_a_character_across_two_reads_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    text = "好👧a" * 50
    file.write_text(text)
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(text_sources, "CHUNK", size)
        assert "".join(text_sources.decoded(file)) == text
        assert "".join(read_texts([file])) == text


@pytest.mark.parametrize("pack", ["", ".gz"])
def test_bytes_that_are_not_utf8_are_refused_with_their_place(tmp_path, monkeypatch, pack):
    good = "好" * 10
    for bad, hint in ((b"\xff", "Convert"), ("中文".encode("gb18030"), "GB18030"), (b"\xe5\xa5", "is 0xe5")):
        file = tmp_path / ("bad.txt" + pack)
        data = good.encode() + bad
        file.write_bytes(gzip.compress(data) if pack else data)
        for size in (1, 4, 1 << 20):
            monkeypatch.setattr(text_sources, "CHUNK", size)
            with pytest.raises(HanlinError, match=f"bad.txt{pack} is not UTF-8: byte 30 ") as error:
                list(read_documents([file]))
        assert hint in str(error.value)
    utf16 = tmp_path / "utf16.txt"
    utf16.write_bytes("text".encode("utf-16"))
    with pytest.raises(HanlinError, match="looks like UTF-16"):
        list(read_documents([utf16]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_archive_is_refused_and_two_in_one_file_are_read(tmp_path, suffix):
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    file = tmp_path / ("a.txt" + suffix)
    file.write_bytes(pack(b"one ") + pack(b"two"))
    assert [document.text for document in read_documents([file])] == ["one two"]
    file.write_bytes(pack(b"one " * 1000)[:-3])
    with pytest.raises(HanlinError, match="is cut off"):
        list(read_documents([file]))
    file.write_bytes(b"this is no archive at all")
    with pytest.raises(HanlinError, match="cannot be unpacked"):
        list(read_documents([file]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]', "a.jsonl:2 is a JSON list"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}', "a.jsonl:2: the field 'text' is a number"),
        ("a.jsonl", '{"body": "a"}', "no field 'text'; its fields are 'body'"),
        ("a.jsonl", '{"text": "a\\ud83d"}', r"a.jsonl:1 holds half a character .*U\+D83D.* at character 1"),
        ("a.json", '{"text": "a"}', "expected a list"),
        ("a.json", "[", "not valid JSON"),
        ("a.parquet", "no parquet", "not a whole parquet file"),
        ("a.txt", " \n\t ", "the corpus is empty"),
        ("a.jsonl", "\n\n", "the corpus is empty"),
    ],
)
def test_a_bad_file_is_answered_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(HanlinError, match=message):
        list(read_documents([tmp_path / name]))


def test_missing_files_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(HanlinError, match="does not exist"):
        find_files([tmp_path / "nowhere.txt"])
    with pytest.raises(HanlinError, match=r"holds no text: looked for \.txt"):
        find_files([tmp_path])
    with pytest.raises(HanlinError, match="No files"):
        find_files([])


def test_progress_adds_up_to_the_size_on_disk(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("a" * 3_000_000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n' * 1000))
    pq.write_table(pa.table({"text": ["c"] * 3000}), tmp_path / "c.parquet")
    seen: list[int] = []
    list(read_documents([tmp_path], advance=seen.append))
    assert sum(seen) == size_on_disk(find_files([tmp_path]))
