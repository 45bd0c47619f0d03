"""Folders that other programs saved, and folders that hold no tokenizer."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.tokens import Tokenizer

TEXTS = ["Hello, world! 12 + 30", "用Python读取文件,好吗?", "  two  spaces\n\n", "naïve 𠮷 \x07", "a"]


def test_a_llama3_folder_is_read_as_transformers_reads_it(llama3):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(llama3), AutoTokenizer.from_pretrained(llama3)
    for text in TEXTS:
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.prompt(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
        assert ours.decode_bytes(ours.encode(text)) == text.encode()
    assert ours.prompt("a")[0] == theirs.bos_token_id


def test_end_tokens_come_from_the_config_the_generation_config_and_the_template(llama3):
    tokenizer = Tokenizer.load(llama3)
    expected = [tokenizer.special[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    assert list(tokenizer.stop_ids) == expected
    assert tokenizer.eos_id == tokenizer.pad_id == expected[0]


def test_a_trimming_template_agrees_with_transformers(llama3):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(llama3), AutoTokenizer.from_pretrained(llama3)
    messages = [{"role": "user", "content": "  hello \n"}, {"role": "assistant", "content": " 你好 "}]
    for generate in (False, True):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)
        assert ours.chat(messages, generate=generate) == expected
    chat = ours.chat_trained(messages)
    answer = [token for token, mine in zip(chat.ids, chat.trained, strict=True) if mine]
    assert ours.decode(answer, skip_special=False) == "你好<|eot_id|>"


def test_added_tokens_that_are_not_special_stay_tokens(llama3):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(llama3), AutoTokenizer.from_pretrained(llama3)
    text = "x<tool_call>y<|eot_id|>"
    assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    call = theirs.convert_tokens_to_ids("<tool_call>")
    assert call in ours.encode(text)
    assert ours.token_bytes(call) == b"<tool_call>"


def test_saving_a_foreign_tokenizer_loses_nothing(llama3, tmp_path):
    before = Tokenizer.load(llama3)
    before.save(tmp_path)
    after = Tokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    assert after.fingerprint == before.fingerprint
    assert after.chat(messages) == before.chat(messages)
    assert after.eos_id == before.eos_id
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"]["content"] == "<|end_of_text|>"
    assert "chat_template" not in config  # it lies in chat_template.jinja now


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_sentencepiece_tokens_spell_the_text(sentencepiece, text: str):
    """The library's own decoder is the reference; it drops the space that the normaliser put in front."""
    tokenizer = Tokenizer.load(sentencepiece)
    ids = tokenizer.encode(text)
    spelled = tokenizer.decode_bytes(ids)
    assert spelled == (b" " if text else b"") + text.replace("▁", " ").encode()
    assert tokenizer.decode(ids) == spelled.decode()[1:]


def test_sentencepiece_bytes_are_bytes(sentencepiece):
    tokenizer = Tokenizer.load(sentencepiece)
    assert tokenizer.eos_id == tokenizer.special["</s>"]
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("𠮷")[1:]] == [
        b"\xf0",
        b"\xa0",
        b"\xae",
        b"\xb7",
    ]
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"</s>"


def test_an_id_that_no_token_has_spells_nothing(tokenizer):
    assert tokenizer.token_bytes(tokenizer.size) == b""
    assert tokenizer.token_bytes(-1) == b""


def _write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))


def test_missing_and_malformed_files_are_explained(tmp_path, folder):
    sound = (folder / "tokenizer.json").read_text()
    cases = {
        "nowhere": (None, "does not exist.*hanlin tokenizer train"),
        "empty": ({}, "has no tokenizer.json"),
        "model": ({"tokenizer__model": "x"}, "SentencePiece tokenizer.model.*save_pretrained"),
        "torn": ({"tokenizer__json": sound[:500]}, "not valid JSON"),
        "other": ({"tokenizer__json": {"hello": 1}}, "not a tokenizer that"),
        "list": ({"tokenizer__json": sound, "tokenizer_config__json": []}, "expected a JSON object"),
        "eos": ({"tokenizer__json": sound, "tokenizer_config__json": {"eos_token": "</s>"}}, "no token '</s>'"),
        "number": (
            {"tokenizer__json": sound, "tokenizer_config__json": {"eos_token": 3}},
            "expected a token's spelling",
        ),
        "ends": ({"tokenizer__json": sound, "generation_config__json": {"eos_token_id": "x"}}, "expected a token id"),
    }
    for name, (files, message) in cases.items():
        if files is not None:
            (tmp_path / name).mkdir()
            _write(tmp_path / name, **files)
        with pytest.raises(HanlinError, match=message):
            Tokenizer.load(tmp_path / name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(HanlinError, match="is a file"):
        Tokenizer.load(tmp_path / "file")


def test_a_folder_that_names_no_end_token_says_so_when_it_is_needed(tmp_path, folder):
    _write(tmp_path, tokenizer__json=(folder / "tokenizer.json").read_text())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("works")
    with pytest.raises(HanlinError, match=r"eos_token.*<\|endoftext\|>"):
        _ = tokenizer.eos_id
    with pytest.raises(HanlinError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "a"}])
