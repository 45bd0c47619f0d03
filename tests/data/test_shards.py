"""Token shards: what comes out is what went in, whatever the workers, and whatever interrupted the build."""

import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.core.text_sources import Document
from hanlin.data import tokenise
from hanlin.data.build import build_shards
from hanlin.data.shards import TokenShards, token_dtype


def contents(shards: TokenShards) -> list[tuple[str, list[int]]]:
    return [
        (shard.name(number), shard.tokens[shard.starts[number] : shard.starts[number + 1]].tolist())
        for shard in shards.shards
        for number in range(len(shard.starts) - 1)
    ]


def test_every_document_is_there_whole_with_its_name_and_end_token(shards, documents, tokenizer):
    expected = [(document.name, [*tokenizer.encode(document.text), tokenizer.eos_id]) for document in documents]
    assert contents(shards) == expected
    assert len(shards.shards) > 3
    assert shards.documents == len(documents)
    assert shards.tokens == sum(len(ids) for _, ids in expected)
    assert shards.text_bytes == sum(len(document.text.encode()) for document in documents)
    assert all(shard.tokens.dtype == np.uint16 and isinstance(shard.tokens, np.memmap) for shard in shards.shards)
    shards.verify()


def test_end_tokens_written_in_a_text_stay_letters(tokenizer, tmp_path):
    shards = build_shards([Document("a", "x<|endoftext|>y")], tokenizer, tmp_path / "s")
    assert contents(shards)[0][1].count(tokenizer.eos_id) == 1
    assert shards.documents == 1


@pytest.mark.parametrize("workers", [2, 3])
def test_parallel_equals_serial_byte_for_byte(documents, tokenizer, tmp_path, monkeypatch, all_files, workers):
    monkeypatch.setattr(tokenise, "PARCEL", 300)
    build_shards(documents, tokenizer, tmp_path / "one", shard_bytes=4000, workers=1)
    build_shards(documents, tokenizer, tmp_path / "many", shard_bytes=4000, workers=workers)
    assert all_files(tmp_path / "one") == all_files(tmp_path / "many")


def test_a_long_document_encoded_in_pieces_is_the_same(tokenizer, monkeypatch):
    chance = random.Random(3)
    text = "".join(chance.choices(["a", "好", " ", "\n", "\r\n", "  ", ".", "1", "text", "'s"], k=4000))
    whole = tokenise.encode([text], tokenizer)[0].tolist()
    assert whole == tokenizer.encode(text)
    for size in (1, 10, 333):
        monkeypatch.setattr(tokenise, "LONG", size)
        assert len(tokenise.pieces_of(text)) > 5
        assert "".join(tokenise.pieces_of(text)) == text
        assert tokenise.encode([text], tokenizer)[0].tolist() == whole


def test_large_vocabularies_take_four_bytes():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_empty_documents_are_left_out_and_an_empty_corpus_is_refused(tokenizer, tmp_path):
    shards = build_shards([Document("a", ""), Document("b", "text")], tokenizer, tmp_path / "some")
    assert [name for name, _ in contents(shards)] == ["b"]
    with pytest.raises(HanlinError, match="corpus is empty"):
        build_shards([Document("a", "")], tokenizer, tmp_path / "none")
    with pytest.raises(HanlinError, match="not finished"):
        TokenShards(tmp_path / "none")


def test_a_shard_of_another_tokenizer_is_refused(shards, other_tokenizer, tokenizer):
    with pytest.raises(HanlinError, match=r"made with another tokenizer: 330 tokens.*in use has 300"):
        TokenShards(shards.path, other_tokenizer)
    from hanlin.tokens import Tokenizer

    assert TokenShards(shards.path, Tokenizer.load(shards.path / "tokenizer")).tokens == shards.tokens


@pytest.mark.parametrize("name", ["tokens.npy", "starts.npy", "names.npy", "name_ends.npy"])
def test_a_truncated_or_missing_file_is_refused_at_opening(shards, name):
    file = shards.path / "shard-00001" / name
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(HanlinError, match=rf"shard-00001/{name} has {len(data) - 1:,} bytes.*says {len(data):,}"):
        TokenShards(shards.path)
    file.unlink()
    with pytest.raises(HanlinError, match=rf"shard-00001/{name} is missing"):
        TokenShards(shards.path)


def test_a_flipped_bit_is_found_when_asked(shards):
    file = shards.path / "shard-00002" / "tokens.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(HanlinError, match=r"shard-00002/tokens.npy is damaged"):
        TokenShards(shards.path).verify()


def test_a_folder_without_shards_is_explained(tmp_path):
    with pytest.raises(HanlinError, match=r"no token shards.*hanlin data build"):
        TokenShards(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(HanlinError, match="not the manifest"):
        TokenShards(tmp_path)


def test_a_finished_build_is_only_opened(shards, documents, tokenizer):
    def never():
        raise AssertionError("read again")
        yield

    again = build_shards(never(), tokenizer, shards.path, shard_bytes=4000)
    assert contents(again) == contents(shards)


def test_another_build_in_the_same_folder_is_refused_unless_asked_for(shards, documents, other_tokenizer, tmp_path):
    with pytest.raises(HanlinError, match=r"made otherwise \(other tokenizer\)"):
        build_shards(documents, other_tokenizer, shards.path, shard_bytes=4000)
    replaced = build_shards(documents, other_tokenizer, shards.path, shard_bytes=4000, overwrite=True)
    assert replaced.manifest["tokenizer"]["size"] == 300
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(HanlinError, match="not empty and holds no token shards"):
        build_shards(documents, other_tokenizer, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


class StoppedError(Exception):
    pass


@settings(deadline=None, max_examples=8)
@given(stop=st.integers(0, 39))
def test_an_interrupted_build_goes_on_to_the_same_bytes(documents, tokenizer, tmp_path_factory, all_files, stop):
    documents = documents[:40]
    path = tmp_path_factory.mktemp("build")
    build_shards(documents, tokenizer, path / "whole", shard_bytes=2000)

    def interrupted():
        yield from documents[:stop]
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(tokenise, "PARCEL", 100)
        build_shards(interrupted(), tokenizer, path / "parts", shard_bytes=2000)
    build_shards(documents, tokenizer, path / "parts", shard_bytes=2000)
    assert all_files(path / "parts") == all_files(path / "whole")


def test_documents_that_changed_since_the_interruption_are_made_anew(documents, tokenizer, tmp_path, all_files):
    def interrupted():
        yield from documents[:100]
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(tokenise, "PARCEL", 100)
        build_shards(interrupted(), tokenizer, tmp_path / "parts", shard_bytes=2000)
    finished = sorted((tmp_path / "parts").glob("shard-*"))
    kept = finished[0].stat().st_mtime_ns
    assert len(finished) > 3
    changed = [*documents[:40], Document("new", "another text"), *documents[41:]]
    build_shards(changed, tokenizer, tmp_path / "parts", shard_bytes=2000)
    build_shards(changed, tokenizer, tmp_path / "whole", shard_bytes=2000)
    assert all_files(tmp_path / "parts") == all_files(tmp_path / "whole")
    assert finished[0].stat().st_mtime_ns == kept


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path, tokenizer, all_files):
    """`kill -9` of a parallel build from the command line, at four random moments of one build."""
    chance = random.Random(0)
    rows = [json.dumps({"text": " ".join(chance.choices(["read", "翰林", "text", "1"], k=60))}) for _ in range(6000)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    tokenizer.save(tmp_path / "tokenizer")
    recipe = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "sources": [{"paths": [str(tmp_path / "corpus.jsonl")]}],
        "shard_mb": 0.1,
        "workers": 2,
    }

    def start(out: str) -> subprocess.Popen[bytes]:
        (tmp_path / f"{out}.yaml").write_text(json.dumps({**recipe, "out": str(tmp_path / out)}))
        command = [sys.executable, "-m", "hanlin", "data", "build", str(tmp_path / f"{out}.yaml"), "--quiet"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    out, error = start("whole").communicate()
    assert b"6,000 documents" in out, error
    killed, finished = 0, 0
    for _ in range(4):
        process = start("parts")
        goal = finished + chance.randint(0, 3)
        while process.poll() is None and finished < goal:
            time.sleep(0.002)
            finished = len(list((tmp_path / "parts").glob("shard-*")))
        time.sleep(chance.uniform(0, 0.05))
        killed += process.poll() is None
        process.kill()
        process.communicate(timeout=20)  # the pipes close: no worker outlives its parent
    assert killed >= 2
    start("parts").communicate()
    ours, theirs = all_files(tmp_path / "parts"), all_files(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours)
