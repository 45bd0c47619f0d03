"""`hanlin plan`: from recipes, names and folders; tables, JSON, a chart; clear words for what cannot be."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hanlin.cli import main
from hanlin.cli.plan import AXES, _layout
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, save_model
from hanlin.models.folder import save_config
from hanlin.plan import calibrate
from hanlin.plan.known import known_config
from hanlin.plan.seconds import Rates
from hanlin.tokens import Tokenizer

RECIPE = """
name: planned
tokenizer: nowhere/tokenizer
model: {kind: new, depth: 4, width: 128, heads: 4, kv_heads: 2, hidden: 256}
objective: {kind: causal_lm, shards: [{path: nowhere/shards}], seq_len: 128}
train: {steps: 100, batch_size: 16, precision: bf16}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model and its tokenizer, with random weights."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train_from_iterator(["The quick brown fox. " * 20], vocab_size=300)
    config = ModelConfig.uniform(
        "llama", depth=2, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(48), vocab_size=tokenizer.size, width=32, max_positions=128,
    )  # fmt: skip
    save_model(Transformer(config), path)
    tokenizer.save(path)
    return path


def planned(capsys, *argv: str) -> dict:
    assert main(["plan", *argv, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_recipe_is_planned_without_its_tokenizer_and_data(recipe, capsys):
    plan = planned(capsys, recipe, "--vocab-size", "4096", "--gpus", "cpu")
    assert plan["tokens"] == 100 * 16 * 128
    run = plan["layouts"][0]["memory_run"]["weights"]  # and tables of sines and cosines
    assert run == pytest.approx(4 * plan["model"]["parameters"], rel=0.02)
    assert main(["plan", recipe]) == 2
    assert "--vocab-size" in capsys.readouterr().err


def test_a_model_folder_and_a_layout(tmp_path, capsys):
    save_config(known_config("qwen3-0.6b"), tmp_path / "model")
    flags = "--gpus 8xH100 --tensor 2 --sequence --shard zero1 --batch 64 --seq-len 1024 --price 2 --tokens 1e9"
    plan = planned(capsys, str(tmp_path / "model"), *flags.split())
    row = plan["layouts"][0]
    assert row["layout"]["data"] == 4 and row["name"] == "TP2+SP x DP4 x zero1"
    assert row["cost"] == pytest.approx(row["days"] * 24 * 8 * 2)
    exact = row["communication_exact"]
    assert exact["tensor"]["payload"] == pytest.approx(row["communication"]["tensor"]["payload"], rel=0.05)
    assert {f["name"] for f in plan["formulas"]} >= {"parameters", "PP x ZeRO-1 a GPU", "FLOPs of a step, PaLM"}


def test_a_table_and_a_chart(recipe, tmp_path, capsys):
    out = tmp_path / "memory.png"
    assert main(["plan", recipe, "--vocab-size", "4096", "--gpus", "H100", "--png", str(out)]) == 0
    shown = capsys.readouterr().out
    for words in ("Layouts", "Memory of the fullest rank", "Time of a step", "Classic formulas", "Compute-optimal"):
        assert words in shown
    assert out.read_bytes().startswith(b"\x89PNG")


def test_lora_and_qlora_need_less(capsys):
    sizes = {}
    for method in ("full", "lora", "qlora"):
        plan = planned(capsys, "llama-3-8b", "--gpus", "H200", "--method", method, "--batch", "1", "--seq-len", "512")
        sizes[method] = plan["layouts"][0]["bytes"]
    assert sizes["qlora"] < sizes["lora"] < 0.4 * sizes["full"]


def test_serving(capsys):
    plan = planned(capsys, "deepseek-r1", "--serve", "--gpus", "8xH200", "--dtype", "fp8")
    assert plan["devices_per_replica"] == 8 and plan["published"]
    assert main(["plan", "llama-3-8b", "--serve", "--gpus", "2xRTX-4090"]) == 0
    assert "requests of 4,096 tokens at once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["llama-3-70", "--gpus", "8xH100"], "Did you mean `llama-3-70b`"),
        (["llama-3-8b", "--gpus", "8xH1O0"], "Nearest: H100"),
        (["llama-3-8b", "--gpus", "8xH100", "--tensor", "3"], "do not divide"),
        (["llama-3-8b", "--rank", "8"], "--rank belongs to --method lora"),
        (["llama-3-8b", "--users", "8"], "--users belong to --serve"),
        (["llama-3-8b", "--serve", "--batch", "8"], "--batch belong to training"),
        (["llama-3-8b", "--gpus", "A100", "--precision", "fp8"], "has no fp8"),
        (["llama-3-8b", "--tokens", "many"], "is no number"),
        (["llama-3-8b", "--sequence"], "sequence shares tokens"),
        (["llama-3-8b", "--schedule", "interleaved"], "schedule interleaved orders the stages of a pipeline"),
        (["llama-3-8b", "--context-kind", "ulysses"], "context_kind ulysses says how context ranks talk"),
        (["llama-3-8b", "--masters", "--precision", "fp32"], "--precision fp32 has none"),
        (["llama-3-8b", "--masters", "--method", "lora"], "--method lora has none"),
        (["llama-3-8b", "--price", "2"], "give --tokens"),
        (["llama-3-8b", "--seq-len", "8193"], "knows only 8192 positions"),
        (["llama-3-8b", "--png", "x.txt"], "it must end in .png, .svg, .pdf"),
        (["llama-3-8b", "--gpus", "2xcpu", "--measure"], "it belongs to --gpus cpu"),
        (["llama-3-8b", "--serve", "--masters", "--sequence"], "--masters, --sequence belong to training"),
        (["llama-3-8b", "--serve", "--context-length", "8193"], "knows only 8192 positions"),
        (["llama-3-8b", "--serve", "--measure"], "Give a model folder"),
    ],
)
def test_mistakes_are_explained(argv, words, capsys):
    assert main(["plan", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["vocab-size", "seq-len", "batch", "tensor", "users", "context-length", "nodes"])
@pytest.mark.parametrize("text", ["0", "-5", "2.5"])
def test_a_count_is_a_whole_number_of_1_or_more(flag, text, capsys):
    assert main(["plan", "llama-3-8b", "--serve", f"--{flag}", text]) == 2
    assert f"--{flag}: '{text}' is no whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["tokens", "price", "reserve", "prompt-cache"])
@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1e400"])
def test_an_amount_is_finite(flag, text, capsys):
    assert main(["plan", "llama-3-8b", f"--{flag}", text]) == 2
    assert f"--{flag}: '{text}' is no number" in capsys.readouterr().err


def test_only_memory_may_be_none_at_all(capsys):
    assert main(["plan", "llama-3-8b", "--tokens", "0"]) == 2
    assert "'0' is not above 0" in capsys.readouterr().err
    assert planned(capsys, "llama-3-8b", "--serve", "--gpus", "H100", "--reserve", "0")["machine"]["reserve"] == 0


def test_the_layout_of_the_flags_is_only_what_they_say():
    parsed = argparse.Namespace(**dict.fromkeys([*AXES, "shard", "schedule", "context_kind"]), sequence=False)
    assert _layout(parsed) is None
    parsed.tensor, parsed.sequence = 2, True
    assert _layout(parsed) == {"tensor": 2, "sequence": True}


def test_a_new_model_grows_with_its_rows(recipe, capsys):
    flags = ("--vocab-size", "4096", "--gpus", "H100")
    assert planned(capsys, recipe, *flags, "--seq-len", "256")["step"]["length"] == 256
    file = Path(recipe)
    file.write_text(RECIPE.replace("kv_heads: 2,", "kv_heads: 2, max_positions: 128,"))
    assert main(["plan", recipe, *flags, "--seq-len", "256"]) == 2
    assert "knows only 128 positions" in capsys.readouterr().err


def test_a_request_is_no_longer_than_the_model(tmp_path, capsys):
    save_config(replace(known_config("qwen3-0.6b"), max_positions=1024), tmp_path / "model")
    assert planned(capsys, str(tmp_path / "model"), "--serve", "--gpus", "H100")["context"] == 1024


def test_what_is_set_aside_is_said(capsys):
    assert main(["plan", "deepseek-r1", "--serve", "--gpus", "8xH200", "--dtype", "fp8"]) == 0
    assert "140 GB of a replica kept for prompts (--prompt-cache)" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_their_words_whole_and_their_lines_short(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    flags = "--gpus 16xH100 --batch 1024 --seq-len 1024 --tokens 15e12 --price 2.5"
    assert main(["plan", "llama-3-8b", *flags.split()]) == 0
    shown = capsys.readouterr().out
    assert "tokens/day" in shown and "cost" in shown
    assert max(map(len, shown.splitlines())) <= width
    formulas = shown[shown.index("Classic formulas") : shown.index("Compute-optimal")]
    assert len(formulas.splitlines()) < 50


def test_the_engine_is_measured_beside_the_roofline(model_folder, capsys):
    measured = planned(capsys, str(model_folder), "--serve", "--measure", "--dtype", "fp32")["measured"]
    assert measured["dtype"] == "fp32" and set(measured["tokens_per_s"]) == {"prefill", "decode"}
    for row in measured["tokens_per_s"].values():
        assert row["predicted"] > 0 and row["measured_of_predicted"] == pytest.approx(
            row["measured"] / row["predicted"]
        )
    assert main(["plan", str(model_folder), "--serve", "--measure"]) == 0
    assert "Beside what the engine does here" in capsys.readouterr().out


def test_this_machines_own_rates_are_used_where_they_were_measured(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = (recipe, "--vocab-size", "4096", "--precision", "fp32")
    assert "seconds_run" not in planned(capsys, *flags)["layouts"][0]
    passes = {("pointwise", "fp32"): [(1000, 1e-6)], ("pointwise", "bool"): [(1000, 1e-6)]}
    products = {(f"mm {kind}", "fp32"): [((64, 64, 64), 2e9)] for kind in ("nn", "nt", "tn", "tt")}
    attention = {(f"attention{kind}", "fp32"): [((64, 64), 1e9)] for kind in ("", " back", " torch", " torch back")}
    monkeypatch.setattr(calibrate, "measure_rates", lambda **_: Rates(products, passes, attention, 1e-6))
    measured = planned(capsys, *flags, "--measure")["layouts"][0]["seconds_run"]
    assert planned(capsys, *flags)["layouts"][0]["seconds_run"] == measured  # kept
    products = sum(seconds for kind, seconds in measured.items() if kind.startswith("mm"))
    weights = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)  # the last token of a row has no target
    assert products == pytest.approx((6 * weights * 16 * 128 + 6 * 4096 * 128 * 16 * 127) / 2e9, rel=1e-6)
    assert main(["plan", *flags, "--gpus", "H100", "--measure"]) == 2
    assert "it belongs to --gpus cpu" in capsys.readouterr().err
