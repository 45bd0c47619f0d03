"""Text to ids and back: exact on anything, and the same as transformers."""

import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.tokens import Tokenizer
from hanlin.tokens.cuts import LONGEST_TOKEN

TRICKY = [
    "",
    " ",
    "\n\n\n  x",
    "it's WE'LL they'Ve",
    "  def f(x):\n\treturn x**2  # 平方\r\n",
    "用Python写123行代码,好吗?",
    "𠮷野家 👩‍👩‍👧 é é ﷺ \u200b\u0000",
    "12345678901234567890",
    "<|endoftext|><|im_end|> <|im_start",
    "一" * 50,
]
anything = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ab 12中文,。\n\t'<|im_end|>startox", max_size=60),
    st.sampled_from(TRICKY),
)


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=80))
def test_any_bytes_survive_a_round_trip(tokenizer: Tokenizer, data: bytes):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@settings(deadline=None, max_examples=300)
@given(text=anything)
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.encode_bytes(text.encode()) == ids
    assert tokenizer.encode_batch([text, text])[1] == ids


@settings(deadline=None, max_examples=300)
@given(text=anything)
def test_text_never_becomes_a_special_token(tokenizer: Tokenizer, text: str):
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=300)
@given(text=anything)
def test_transformers_agrees_token_for_token(tokenizer: Tokenizer, theirs, text: str):
    assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformers_agrees_in_a_model_folder_of_any_family(tokenizer: Tokenizer, tmp_path, family: str):
    """transformers picks the tokenizer's class by the family, and some classes bring cuts of their own."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer.save(tmp_path)
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.size


def test_what_transformers_saves_again_is_the_same_tokenizer(tokenizer: Tokenizer, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.stop_ids == tokenizer.stop_ids
    assert again.size == tokenizer.size
    assert [again.encode(text) for text in TRICKY] == [tokenizer.encode(text) for text in TRICKY]


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, folder):
    again = Tokenizer.load(folder)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.stop_ids == tokenizer.stop_ids == (tokenizer.special["<|endoftext|>"], tokenizer.special["<|im_end|>"])
    assert pickle.loads(pickle.dumps(again)).encode("翰林 tokens") == tokenizer.encode("翰林 tokens")


def test_no_token_mixes_chinese_with_anything_else(tokenizer: Tokenizer):
    chinese = 0
    for token in range(tokenizer.size):
        letters = tokenizer.token_bytes(token).decode("utf-8", errors="ignore")
        if re.search("[一-鿿]", letters):
            chinese += 1
            assert re.fullmatch("[一-鿿]{1,8}", letters), letters
    assert chinese > 15


def test_every_digit_is_a_token_and_tokens_are_short(tokenizer: Tokenizer):
    assert len(tokenizer.encode("9081726354")) == 10
    for token in range(tokenizer.size):
        spelled = tokenizer.token_bytes(token)
        assert len(spelled) <= LONGEST_TOKEN
        assert len(re.findall(rb"\d", spelled)) <= 1 or token in tokenizer.special.values()


def test_roles_of_the_chat_template_are_single_tokens(tokenizer: Tokenizer):
    assert [len(tokenizer.encode(role)) for role in ("system", "user", "assistant")] == [1, 1, 1]


def test_every_byte_is_a_token(tokenizer: Tokenizer):
    single = {tokenizer.token_bytes(token) for token in range(tokenizer.size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_half_a_character_is_refused_with_its_place(tokenizer: Tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(HanlinError, match=r"U\+D83D.* at character 3"):
            encode("abc\ud83d")
    assert tokenizer.decode(tokenizer.encode("你好")[:1]) in ("你好", "�", "你")


def test_the_fingerprint_is_of_the_cuts_and_merges_and_not_of_the_template(tokenizer, corpus, folder, tmp_path):
    other = Tokenizer.train_from_iterator(corpus, vocab_size=1199)
    assert other.fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    text = (tmp_path / "tokenizer.json").read_text()
    assert "?!" in text
    (tmp_path / "tokenizer.json").write_text(text.replace("(?!", "(?=", 1))
    assert Tokenizer.load(tmp_path).fingerprint != tokenizer.fingerprint


def test_training_does_not_depend_on_the_order_of_the_texts(corpus):
    forwards = Tokenizer.train_from_iterator(corpus, vocab_size=700)
    backwards = Tokenizer.train_from_iterator(reversed(corpus), vocab_size=700)
    assert forwards.fingerprint == backwards.fingerprint


def test_threads_share_a_tokenizer(tokenizer: Tokenizer):
    text = "a <|im_end|> b"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert plain != special
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: tokenizer.encode(text, special=bool(i % 2)), range(400)))
    assert found == [special if i % 2 else plain for i in range(400)]


def test_files_of_every_kind_train_the_same_tokenizer(corpus, tmp_path):
    import gzip
    import json

    (tmp_path / "a.txt").write_text("\n".join(corpus))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "\n".join(corpus)}).encode()))
    from_text = Tokenizer.train([tmp_path / "a.txt"], vocab_size=600)
    from_rows = Tokenizer.train([tmp_path / "b.jsonl.gz"], vocab_size=600)
    assert from_text.fingerprint == from_rows.fingerprint


@pytest.mark.parametrize(
    ("texts", "size", "special", "message"),
    [
        (["text"], 200, (), "too small.*264"),
        ([], 400, (), "no text"),
        ([""], 400, (), "no text"),
        (["text"], 400, ("<|pad|>",), "must be different"),
        (["text"], 400, ("",), "not empty"),
    ],
)
def test_training_refuses(texts, size, special, message):
    with pytest.raises(HanlinError, match=message):
        Tokenizer.train_from_iterator(texts, vocab_size=size, special=special)


def test_own_special_tokens_are_special(corpus):
    tokenizer = Tokenizer.train_from_iterator(corpus, vocab_size=500, special=["<|call|>"])
    assert tokenizer.encode("<|call|>", special=True) == [tokenizer.special["<|call|>"]]
    assert tokenizer.special["<|call|>"] not in tokenizer.encode("<|call|>")
