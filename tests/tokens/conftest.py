"""One small tokenizer trained on English, Chinese and code, and folders as other programs save them."""

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hanlin.tokens import Tokenizer

CHINESE = """翰林院里的书很多,学生们每天都在读书。语言模型把文字变成数字,再把数字变成文字。
今天天气很好,我们一起去公园散步吧!人工智能可以帮助我们写代码,也可以回答问题。
请问如何用Python读取文件?可以使用open函数,然后调用read方法。三加五等于八,12+30=42。
中文没有空格,所以分词比英文难一些;但是字节级的模型不会遇到未知的字。"""


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    code = inspect.getsource(textwrap) + inspect.getsource(argparse)[:60_000]
    return [code, *([CHINESE] * 6), *CHINESE.splitlines(), "It's what we'll say: don't, they've, I'm, you'd."]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> Tokenizer:
    return Tokenizer.train_from_iterator(corpus, vocab_size=1200)


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


LLAMA3_TEMPLATE = (
    "{{- bos_token }}\n{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}\n{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def llama3(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with a beginning token, a template that trims, and two end tokens in generation_config.json."""
    path = tmp_path_factory.mktemp("llama3")
    engine = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    engine.train_from_iterator(corpus, trainer)
    engine.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    engine.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", engine.token_to_id("<|begin_of_text|>"))]
    )
    engine.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|end_of_text|>", "lstrip": False, "rstrip": False, "__type": "AddedToken"},
        "chat_template": LLAMA3_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ends = [engine.token_to_id("<|end_of_text|>"), engine.token_to_id("<|eom_id|>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


@pytest.fixture(scope="session")
def sentencepiece(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BPE over characters with byte fallback, as Llama 2 and Mistral have it."""
    path = tmp_path_factory.mktemp("sentencepiece")
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    lines = [line for text in corpus for line in text.splitlines()]
    engine.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False))
    description = json.loads(engine.to_str())
    vocabulary = description["model"]["vocab"]
    for spelling in alphabet:
        vocabulary[spelling] = len(vocabulary)
    (path / "tokenizer.json").write_text(json.dumps(description))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return path
