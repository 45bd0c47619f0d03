"""GGUF files beside the `gguf` package, which writes and dequantises them, and transformers, whose models they hold."""

import json
import re
import struct
from itertools import pairwise

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tests.models.gguf_files import write_gguf
from tests.models.oracle import make_oracle
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hanlin.core.errors import HanlinError
from hanlin.models import load_model
from hanlin.models.formats.gguf import SIZES, GgufFile, dequantise
from hanlin.models.formats.gguf_model import convert_gguf
from hanlin.models.formats.gguf_tokenizer import read_tokenizer
from hanlin.tokens import Tokenizer
from hanlin.tokens.folder import write_folder

TEXTS = [
    "The quick brown fox didn't jump over 13 lazy dogs; it's 2024, and they'll say: WE'LL SEE!",
    "def f(x):\n\tif x > 10:\r\n        return x ** 2   # why?\n\n\n",
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？共3456个字。",
    "混合 text，含 English 和 12.5% 的数字 😀👍🏽 ﬁ café",
    "  two  spaces ",
    "",
]


# -- numbers


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_random_blocks_are_dequantised_exactly_as_by_gguf(kind):
    """Any bytes: the scales are NaN and infinite too."""
    blocks = np.random.default_rng(0).integers(0, 256, (512, SIZES[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).ravel()
        found = dequantise(blocks.ravel(), kind)
    assert found.dtype == torch.float32 and np.isfinite(expected).mean() > 0.9
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_numbers_are_read_as_they_are(kind, tmp_path):
    oracle = make_oracle("llama")
    expected = write_gguf(tmp_path / "x.gguf", oracle, kind)["model.layers.1.mlp.up_proj.weight"]
    found = GgufFile(tmp_path / "x.gguf").read("blk.1.ffn_up.weight")
    assert str(found.dtype) == {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}[kind]
    assert torch.equal(found.float(), expected)


def test_large_tensors_are_read_in_pieces_without_a_seam(tmp_path, monkeypatch):
    oracle = make_oracle("llama")
    write_gguf(tmp_path / "x.gguf", oracle, "Q4_1")
    file = GgufFile(tmp_path / "x.gguf")
    whole = file.read("token_embd.weight")
    monkeypatch.setattr("hanlin.models.formats.gguf.CHUNK", 96)
    assert torch.equal(file.read("token_embd.weight"), whole)
    assert torch.equal(file.read("token_embd.weight", dtype=torch.bfloat16), whole.bfloat16())


# -- models

ROUND_TRIPS = ["llama", "llama-gqa-4", "llama-biases", "llama-head-dim"]
ROUND_TRIPS += ["qwen2", "qwen2-tied-mqa", "qwen3", "qwen3-tied"]


@pytest.mark.parametrize("name", ROUND_TRIPS)
@torch.no_grad()
def test_a_model_comes_back_from_gguf_with_equal_logits(name, tmp_path):
    oracle = make_oracle(name)
    write_gguf(tmp_path / "x.gguf", oracle)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", quiet=True)
    found = load_model(tmp_path / "out", device="cpu")
    assert found.config.tied_embeddings == oracle.config.tie_word_embeddings
    assert logits_differ(found, oracle) < 2e-5


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@torch.no_grad()
def test_a_quantised_model_computes_with_its_dequantised_weights(kind, tmp_path):
    oracle = make_oracle("llama")
    before = oracle(ids_of(oracle)).logits
    oracle.load_state_dict(write_gguf(tmp_path / "x.gguf", oracle, kind))
    assert (oracle(ids_of(oracle)).logits - before).abs().max() > 1e-3  # it is another model now
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype="float32", quiet=True)
    assert logits_differ(load_model(tmp_path / "out", device="cpu"), oracle) < 2e-5


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16"), ("Q4_0", "bfloat16")],
)
def test_weights_stay_as_stored_and_quantised_ones_become_bfloat16(kind, dtype, tmp_path):
    write_gguf(tmp_path / "x.gguf", make_oracle("qwen3"), kind)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", quiet=True)
    assert str(load_model(tmp_path / "out", device="cpu").dtype) == f"torch.{dtype}"


@torch.no_grad()
def test_transformers_reads_the_written_folder(tmp_path):
    oracle = make_oracle("llama-gqa-4")
    write_gguf(tmp_path / "x.gguf", oracle)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", quiet=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(theirs(ids_of(oracle)).logits, oracle(ids_of(oracle)).logits, rtol=0, atol=1e-5)
    assert theirs.generation_config.eos_token_id == [2, 0] and theirs.generation_config.pad_token_id == 2


@torch.no_grad()
def test_shards_hold_the_same_model(tmp_path):
    oracle = make_oracle("qwen2")
    write_gguf(tmp_path / "x.gguf", oracle)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", shard_bytes=60_000, quiet=True)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert logits_differ(load_model(tmp_path / "out", device="cpu"), oracle) < 2e-5


def stretched(kind):
    """What the file says of a stretched model, and transformers' words for it."""
    if kind == "linear":
        return {"rope_type": "linear", "factor": 4.0}, lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
            writer.add_rope_scaling_factor(4.0),
        )
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            writer.add_rope_scaling_factor(4.0),
            writer.add_rope_scaling_orig_ctx_len(16),
        )
    divisors, dim = [], 16  # arXiv:2407.21783's rule, frequency by frequency
    for pair in range(dim // 2):
        wavelength = 2 * np.pi * 50_000.0 ** (2 * pair / dim)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        plain = 1.0 if wavelength < 8192 / 4.0 else 8.0
        divisors.append(1 / ((1 - smooth) / 8.0 + smooth) if 8192 / 4.0 <= wavelength <= 8192 else plain)
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": 8.0, **rule}, lambda writer: writer.add_tensor(
        "rope_freqs.weight", np.array(divisors, dtype=np.float32)
    )


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
@torch.no_grad()
def test_stretched_positions_are_found_again(kind, tmp_path):
    words, add = stretched(kind)
    oracle = make_oracle("llama", rope_parameters={"rope_theta": 50_000.0, **words})
    write_gguf(tmp_path / "x.gguf", oracle, add=add)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", quiet=True)
    found = load_model(tmp_path / "out", device="cpu")
    assert logits_differ(found, oracle) < 2e-5
    assert logits_differ(found, make_oracle("llama")) > 1e-3 or kind == "llama3"  # whose short positions hardly move
    written = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert written["rope_type"] == kind
    assert [written[key] for key in list(words)[1:]] == pytest.approx(list(words.values())[1:])


def ids_of(oracle):
    return torch.randint(0, oracle.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


def logits_differ(ours, oracle):
    ids = ids_of(oracle)
    return float((ours(ids).logits - oracle(ids).logits).abs().max())


# -- tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def original(pre):
    """A tokenizer as the models of that kind have it, in the library's own parts. Its merges are learnt from the texts
    above uncut, so that every cut shows."""
    engine = tokenizers.Tokenizer(models.BPE())
    words = {"gpt-2": GPT2, "smollm": GPT2, "llama-bpe": TIKTOKEN.replace("NUMBERS", r"\p{N}{1,3}")}
    words["qwen2"] = TIKTOKEN.replace("NUMBERS", r"\p{N}")
    steps = [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")] if pre == "smollm" else []
    steps += [pre_tokenizers.Split(Regex(words[pre]), "isolated")]
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    engine.normalizer = normalizers.NFC() if pre == "qwen2" else None
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    engine.train_from_iterator(TEXTS * 3, trainer)
    engine.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return engine


def metadata_of(engine, pre, **more):
    model = json.loads(engine.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") and len(token) > 4 else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_tokenizer_cuts_as_the_original_and_transformers_reads_it(pre, tmp_path):
    engine = original(pre)
    found = read_tokenizer(metadata_of(engine, pre), tmp_path)
    assert (found.bos, found.eos, found.pad, found.ends) == (1, 2, None, (2, 0))
    write_folder(tmp_path, found.files)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == engine.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.prompt(text) == theirs(text)["input_ids"] == ids
        assert ours.decode(ids) == text
    assert ours.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    messages = [{"role": "user", "content": "你好 the fox<|im_end|>"}]
    assert ours.decode(ours.chat(messages), skip_special=False) == "<|im_start|>你好 the fox<|im_end|><|im_end|>"
    assert ours.chat(messages).count(2) == 1  # what a user writes is no end of a turn


def test_the_cuts_differ_where_they_should():
    """Else the test above would pass with any of them."""
    text = "\n".join(TEXTS)
    cut = {tuple(original(pre).encode(text).tokens) for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")}
    assert len(cut) == 4


def test_qwen_composes_characters_and_llama_3_takes_whole_words(tmp_path):
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        metadata = metadata_of(original(pre), pre)
        metadata["tokenizer.ggml.tokens"] += ["Ġqzx"]  # no merges lead there
        metadata["tokenizer.ggml.token_type"] += [1]
        found = read_tokenizer(metadata, tmp_path)
        write_folder(tmp_path, found.files)
        ours = Tokenizer.load(tmp_path)
        assert (ours.encode(" qzx") == [found.size - 1]) == (pre == "llama-bpe")
        assert (ours.encode("cafe\u0301") == ours.encode("caf\u00e9")) == (pre == "qwen2")


def test_beginning_and_end_tokens_go_where_the_file_says(tmp_path):
    engine = original("llama-bpe")
    plain = engine.encode("the fox", add_special_tokens=False).ids
    default = metadata_of(engine, "llama-bpe")
    del default["tokenizer.ggml.add_bos_token"]
    for metadata, expected in (
        (default, [1, *plain]),  # Llama 3 begins so without being asked
        (metadata_of(engine, "llama-bpe", add_bos_token=True, add_eos_token=True), [1, *plain, 2]),
        (metadata_of(engine, "llama-bpe"), plain),
    ):
        write_folder(tmp_path, read_tokenizer(metadata, tmp_path).files)
        assert Tokenizer.load(tmp_path).prompt("the fox") == expected
        assert AutoTokenizer.from_pretrained(tmp_path)("the fox")["input_ids"] == expected


def test_unused_tokens_leave_holes_and_user_tokens_are_no_special_ones(tmp_path):
    engine = original("qwen2")
    metadata = metadata_of(engine, "qwen2")
    metadata["tokenizer.ggml.tokens"] += ["<think>", "[PAD1]", "[PAD2]"]
    metadata["tokenizer.ggml.token_type"] += [4, 5, 5]
    found = read_tokenizer(metadata, tmp_path)
    write_folder(tmp_path, found.files)
    ours, think = Tokenizer.load(tmp_path), found.size - 3
    assert ours.encode("<think>好") == [think, *engine.encode("好", add_special_tokens=False).ids]
    assert ours.size == think + 1 and "<think>" not in ours.special and ours.decode([think + 1]) == ""


def sentencepiece_twin(text, scores, tokens):
    """SentencePiece's BPE with loops: join, again and again, the neighbours whose token has the highest score."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not joined:
            break
        i = -max(joined)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for piece in pieces:
        ids += [tokens.index(piece)] if piece in scores else [tokens.index(f"<0x{b:02X}>") for b in piece.encode()]
    return ids


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    rng = np.random.default_rng(0)
    letters = sorted(set("".join(TEXTS[:3]).replace(" ", "▁")) - set("\n\r\t学"))
    pieces = set(letters)
    for text in TEXTS[:3]:
        joined = "▁" + text.replace(" ", "▁")
        spans = [joined[i : i + n] for n in (2, 3, 4, 5) for i in range(len(joined) - n + 1)]
        pieces |= {span for span in spans if rng.random() < 0.5 and set(span) <= set(letters)}
    pieces = sorted(pieces, key=lambda piece: (len(piece) > 1, rng.random()))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    write_folder(tmp_path, read_tokenizer(metadata, tmp_path).files)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    table = dict(zip(tokens[259:], scores[259:], strict=True))
    for text in TEXTS[:-1]:
        ids = ours.encode(text)
        assert ids == sentencepiece_twin(text, table, tokens)
        assert ours.prompt(text) == [1, *ids] == theirs(text)["input_ids"]
        assert ours.decode(ids) == text
    assert ours.eos_id == 2


# -- what is refused


def broken(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data) or data))


def replace_bytes(old, new):
    def change(data):
        assert data.count(old) >= 1 and len(old) == len(new)
        return bytes(data).replace(old, new, 1)

    return change


def number_behind(name, skip, value):
    """Write a 4-byte number `skip` bytes behind a name."""

    def change(data):
        place = bytes(data).index(name) + len(name) + skip
        data[place : place + 4] = struct.pack("<I", value)

    return change


FILES = {
    "no GGUF": (lambda d: b"GGML" + d[4:], "no GGUF file"),
    "empty": (lambda d: d[:5], "no GGUF file: it has 5 bytes"),
    "version 1": (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "GGUF version 1; Hanlin reads 2 and 3"),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
    "cut off in the metadata": (lambda d: d[:300], "is cut off: at byte"),
    "cut off in the weights": (lambda d: d[:-9000], "it is cut off. Copy"),
    "a count of metadata that cannot be": (lambda d: d[:16] + b"\xff" * 8 + d[24:], "GGUF|UTF-8|cut off|stands there"),
    "a count of tensors that cannot be": (lambda d: d[:8] + b"\xff" * 8 + d[16:], "dimensions|UTF-8|cut off|twice"),
    "an unknown type of tensor": (number_behind(b"output_norm.weight", 12, 77), "type number 77|cut off"),
    "a type that is not read": (number_behind(b"blk.1.ffn_up.weight", 20, 12), "'blk.1.ffn_up.weight' of type Q4_K"),
    "a missing tensor": (
        replace_bytes(b"blk.2.attn_v.weight", b"blk.2.attn_x.weight"),
        "no tensor 'blk.2.attn_v.weight'",
    ),
    "another architecture": (replace_bytes(b"\0\0\0\0llama", b"\0\0\0\0mamba"), "architecture 'mamba'"),
    "a million layers": (number_behind(b"llama.block_count", 4, 1 << 20), "announces 1048576 layers"),
    "an unknown setting": (
        replace_bytes(b"llama.context_length", b"llama.logit_softcaps"),
        "does not know the setting 'llama.logit_softcaps'",
    ),
    "an unknown metadata type": (number_behind(b"llama.context_length", 0, 99), "is of type 99"),
    "unknown cuts": (replace_bytes(b"smollm", b"smolla"), "cuts texts in a way called 'smolla'"),
    "another tokenizer": (replace_bytes(b"gpt2", b"bert"), "a tokenizer of the kind 'bert'"),
    "a merge of nothing": (replace_bytes(b"th e", b"tq e"), "the merge 'tq e' does not join"),
    "no UTF-8": (replace_bytes(b"smollm", b"smol\xff\xfe"), "is not UTF-8"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_explained_and_nothing_is_written(case, tmp_path):
    change, said = FILES[case]
    write_gguf(tmp_path / "x.gguf", make_oracle("llama"))
    broken(tmp_path / "x.gguf", change)
    with pytest.raises(HanlinError, match=said):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out", quiet=True)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


MODELS = {
    "more than it should": (lambda w: w.add_tensor("blk.0.exps.weight", np.ones((2, 2), np.float32)), "has no place"),
    "experts": (lambda w: w.add_expert_count(8), "`llama.expert_count` is 8; expected 0"),
    "half of a head turns": (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count` is 8; expected 16"),
    "other divisors": (
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)),
        "not those of Llama 3's rule",
    ),
    "an unknown stretch": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "none, linear or yarn"),
    "a part": (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_this_model_cannot_be_is_refused_by_name(case, tmp_path):
    add, said = MODELS[case]
    write_gguf(tmp_path / "x.gguf", make_oracle("llama"), add=add)
    with pytest.raises(HanlinError, match=re.escape(said)):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out", quiet=True)


def test_a_model_without_a_tokenizer_and_a_wrong_dtype_are_refused(tmp_path):
    write_gguf(tmp_path / "x.gguf", make_oracle("llama"), tokenizer=False)
    with pytest.raises(HanlinError, match="holds no tokenizer"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out", quiet=True)
    with pytest.raises(HanlinError, match="Unknown dtype 'int4'"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype="int4", quiet=True)
    with pytest.raises(HanlinError, match="does not exist"):
        GgufFile(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_random_damage_is_a_hanlin_error_or_harmless(name, tmp_path):
    """Bytes of the header, metadata and tensor table replaced at random: never another exception, never a hang."""
    write_gguf(tmp_path / "x.gguf", make_oracle(name, num_hidden_layers=1))
    whole, rng = (tmp_path / "x.gguf").read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, 3000, rng.integers(1, 5)):
            data[place] = rng.integers(0, 256)
        (tmp_path / "y.gguf").write_bytes(data)
        try:
            convert_gguf(tmp_path / "y.gguf", tmp_path / "out", quiet=True)
        except HanlinError:
            continue
