"""`hanlin eval` prints what `evaluate_files` says, with the baselines beside it."""

import json

import pytest
import torch

from hanlin.cli import main
from hanlin.evaluate.ngram import ByteNgram
from hanlin.evaluate.perplexity import evaluate_files
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, load_model, save_model
from hanlin.tokens import Tokenizer

TRAIN = "The frame returns the list of names. 函数返回名字的列表。" * 5
TEST = "The list returns the frame. 列表返回函数。" * 3


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train_from_iterator([TRAIN], vocab_size=280)
    config = ModelConfig.uniform(
        "qwen3",
        depth=1,
        attention=AttentionConfig(2, 1, 8, qk_norm=True),
        feed_forward=FeedForwardConfig(32),
        vocab_size=tokenizer.size,
        width=16,
        max_positions=64,
        init_std=0.3,
    )
    save_model(Transformer(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "train.txt").write_text(TRAIN, encoding="utf-8")
    (tmp_path / "test.txt").write_text(TEST, encoding="utf-8")
    return tmp_path


def test_the_table_and_the_json_say_the_same(folder, capsys):
    command = ["eval", str(folder / "model"), "--text", str(folder / "test.txt"), "--quiet"]
    assert main([*command, "--train-text", str(folder / "train.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(folder / "model"), Tokenizer.load(folder / "model")
    expected = evaluate_files(model, tokenizer, [folder / "test.txt"]).row()
    assert {k: found[k] for k in expected} == expected
    assert found["baselines"]["byte 6-gram"] == ByteNgram.train([TRAIN]).bits_per_byte([TEST])
    assert main(command) == 0
    table = capsys.readouterr().out
    assert f"{expected['bits_per_byte']:.4f}" in table and f"{expected['loss']:.4f} nats a token" in table


def test_samples_follow_the_seed(folder, capsys):
    command = ["eval", str(folder / "model"), "--sample", "The list", "--sample", "列表", "--max-tokens", "8"]
    printed = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert "**The list**" in printed[0] and "**列表**" in printed[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--sample", "x", "--train-text", "a"], "which is missing"),
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--text", "test.txt", "--context", "100"], "between 1 and the 64"),
        (["--sample", "x", "--device", "cuda:77"], "cuda:77"),
    ],
)
def test_a_mistake_is_one_paragraph(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["eval", "model", *arguments]) == 2
    assert message in capsys.readouterr().err
