"""`hanlin model new` makes what it was asked for; `hanlin model show` says what is there."""

import json

import pytest
import torch
from tests.models.oracle import load_theirs, logits_of, some_ids

from hanlin.cli import main
from hanlin.cli.model import FAMILIES
from hanlin.models import load_model
from hanlin.tokens import Tokenizer

SIZE = ["--layers", "2", "--width", "32", "--heads", "4", "--kv-heads", "2", "--max-positions", "64"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_loads_here_and_in_transformers(tmp_path, family):
    out = tmp_path / "model"
    command = ["model", "--quiet", "new", "--family", family, *SIZE, "--vocab-size", "50", "--out", str(out)]
    assert main(command) == 0
    model = load_model(out)
    assert model.config.family == family and model.config.layers[0].attention.kv_heads == 2
    ids = some_ids(vocabulary=50)
    assert (logits_of(model, ids) - logits_of(load_theirs(out), ids)).abs().max() <= 2e-5


def test_the_seed_decides_the_weights(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        command = [
            "model",
            "--quiet",
            "new",
            *SIZE,
            "--vocab-size",
            "50",
            "--seed",
            seed,
            "--out",
            str(tmp_path / name),
        ]
        assert main(command) == 0
    a, b, c = (load_model(tmp_path / name).head_weight for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_tokenizer_gives_size_files_and_end_tokens(tmp_path):
    tokenizer = Tokenizer.train_from_iterator(["a few words 几个字"], vocab_size=266)
    tokenizer.save(tmp_path / "tokenizer")
    command = ["model", "--quiet", "new", *SIZE, "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*command, "--out", str(tmp_path / "model"), "--dtype", "bfloat16"]) == 0
    model = load_model(tmp_path / "model")
    assert model.config.vocab_size == tokenizer.size and model.head_weight.dtype == torch.bfloat16
    assert model.config.extra["eos_token_id"] == list(tokenizer.stop_ids)
    assert Tokenizer.load(tmp_path / "model").fingerprint == tokenizer.fingerprint


def test_show_counts_what_is_there(tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["model", "--quiet", "new", *SIZE, "--vocab-size", "50", "--untied", "--out", str(out)]) == 0
    assert main(["model", "show", str(out), "--json", "--length", "16"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = load_model(out)
    assert facts["parameters"] == sum(facts["parameters_by_part"].values()) == model.parameter_count()
    assert facts["parameters_by_part"]["head"] == 50 * 32
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, width, fp32
    matmul = facts["parameters"] - facts["parameters_by_part"]["embedding"] - facts["parameters_by_part"]["norms"]
    assert facts["training_flops_per_token"] == 6 * matmul + 12 * 2 * 4 * 8 * 16
    assert main(["model", "show", str(out)]) == 0
    assert "qwen3" in capsys.readouterr().out
    assert facts["weight_bytes"]["fp32"] == 4 * model.parameter_count()
    assert list(facts["layers"]) == ["0-1"] and facts["layers"]["0-1"]["mask"] == "causal"


def test_diff_says_what_differs_in_the_words_of_the_field(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    same = [*SIZE, "--vocab-size", "50"]
    for name, more in (("a", []), ("b", ["--family", "mistral", "--window", "8", "--kv-heads", "1"])):
        assert main(["model", "--quiet", "new", *same, *more, "--out", str(tmp_path / name)]) == 0
    assert main(["model", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    for words in ("GQA, 4 heads on 2 of 8, QK norm", "MQA, 4 heads on 1 of 8", "Window(8)", "every layer", "KV bytes"):
        assert words in said
    assert "context" not in said
    assert main(["model", "diff", str(tmp_path / "a"), str(tmp_path / "a/config.json")]) == 0
    assert "the same model" in capsys.readouterr().out


def test_a_balanced_config_has_the_wanted_size(tmp_path, capsys):
    out = tmp_path / "like"
    assert main(["model", "new", "--like", "qwen3", "--params", "0.6B", "--out", str(out)]) == 0
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "generation_config.json"]
    capsys.readouterr()
    assert main(["model", "show", str(out / "config.json"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0.55e9 <= facts["parameters"] <= 0.65e9
    small = ["--like", "llama", "--params", "2M", "--vocab-size", "512", "--weights", "--out", str(tmp_path / "small")]
    assert main(["model", "--quiet", "new", *small]) == 0
    assert 1.8e6 <= load_model(tmp_path / "small").parameter_count() <= 2.2e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "5"], "does not divide among 5 heads"),
        (["--kv-heads", "3"], "do not divide among 3"),
        (["--layers", "0"], "--layers is 0"),
        (["--vocab-size", "0"], "--vocab-size is 0"),
        (["--family", "gpt2"], "gpt2"),
        (["--family", "llama", "--window", "8"], "no sliding windows"),
        (["--out", "."], "already there"),
        (["--like", "qwen3"], "--like needs --params"),
        (["--like", "qwen3", "--params", "1M"], "the sizes are chosen"),
        (["--params", "1M"], "belong to --like"),
    ],
)
def test_a_mistake_is_one_paragraph_and_leaves_nothing(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["model", "new", *SIZE, "--vocab-size", "50", "--out", "x", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_vocabulary_nothing_is_guessed(tmp_path, capsys):
    assert main(["model", "new", *SIZE, "--out", str(tmp_path / "x")]) == 2
    assert "--tokenizer DIR or --vocab-size N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "qwen3", "--params", "lots"], "'lots'; it must be a number of parameters"),
        (["--like", "qwen3", "--params", "3M"], "the nearest has"),
        (["--width", "64"], "--layers, --heads must be given too"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(tmp_path, capsys, arguments, message):
    assert main(["model", "new", *arguments, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()
