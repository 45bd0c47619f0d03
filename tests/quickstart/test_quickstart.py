"""`hanlin quickstart` at its smallest, from the command line: text to report, again, and after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hanlin.core.metrics import read_metrics

TINY = [
    *("--no-serve", "--minutes", "0.1", "--vocab-size", "600", "--seq-len", "96", "--held-out", "0.1"),
    *("--model.depth", "2", "--model.width", "32", "--model.heads", "2", "--model.head-dim", "16"),
    *("--model.hidden", "64", "--pretrain.steps", "40", "--sft.steps", "40"),
    *("--pretrain.precision", "fp32", "--sft.precision", "fp32"),
    *("--instructions.facts", "10", "--instructions.expressions", "60", "--instructions.word-expressions", "20"),
    *("--instructions.word-sums", "20", "--instructions.unknowable", "20", "--instructions.small-talk", "20"),
    *("--instructions.evaluated", "2"),
]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in two languages that nobody else has: titled passages of invented sentences."""
    chance = random.Random(0)
    things = ["river", "mountain", "garden", "teacher", "winter", "lantern", "bridge", "letter", "window", "market"]
    acts = ["crossed", "found", "remembered", "painted", "lost", "carried", "followed", "opened"]
    parts = []
    for number in range(60):
        sentences = [
            f"The {chance.choice(things)} that the {chance.choice(things)} {chance.choice(acts)} stood by the "
            f"{chance.choice(things)} number {chance.randrange(90)}."
            for _ in range(6)
        ]
        chinese = "".join(
            f"第{chance.randrange(90)}天，{c}在园中看花，写下一首小诗。" for c in chance.sample("张王李赵", 2)
        )
        parts.append(f"## Part {number}\n\n{' '.join(sentences)}\n\n{chinese}\n")
    path = tmp_path_factory.mktemp("text") / "story.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def quickstart(out: Path, story: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, story, *more), env=environment(), text=True, encoding="utf-8", capture_output=True, timeout=240
    )


def command(out: Path, story: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "hanlin", "quickstart", "--text", str(story), "--out", str(out), *TINY, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def stages(out: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/done.json"))}


@pytest.fixture(scope="module")
def made(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    done = quickstart(out, story)
    assert done.returncode == 0, done.stderr
    assert str(out / "report.md") in done.stdout
    return out


def test_everything_is_made(made: Path) -> None:
    assert list(stages(made)) == [
        *("1-text", "2-instructions", "3-tokenizer", "4-shards"),
        *("5-plan", "6-pretrain", "7-sft", "8-evaluation"),
    ]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (made / "model" / name).exists()
    rows = [row for row in read_metrics(made / "6-pretrain" / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["step"] == 40
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_report_shows_what_was_learnt(made: Path) -> None:
    report = (made / "report.md").read_text(encoding="utf-8")
    for heading in ("What was made", "Held-out text", "Exact answers", "A conversation", "Samples", "Time and memory"):
        assert f"## {heading}" in report
    for name in ("bits per byte", "6-gram", "xz", "tokens/s", "MFU", "peak memory", "你是谁？", "story.md"):
        assert name in report
    assert (made / "report.png").read_bytes().startswith(b"\x89PNG")
    bits = stages(made)["8-evaluation"]["result"]["perplexity"]
    assert bits["pretrain"]["bits_per_byte"] < bits["start"]["bits_per_byte"]


def test_transformers_reads_the_model(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    assert model.config.vocab_size == len(tokenizer)


def test_second_run_does_nothing_and_a_change_redoes_what_follows(made: Path, story: Path) -> None:
    before = stages(made)
    stamps = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file() and p.name != "recipe.yaml"}
    again = quickstart(made, story)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is there already") == 8
    assert stages(made) == before
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    changed = quickstart(made, story, "--sft.lr", "1e-3")
    assert changed.returncode == 0, changed.stderr
    after = stages(made)
    same = [name for name in before if after[name]["fingerprint"] == before[name]["fingerprint"]]
    assert same == ["1-text", "2-instructions", "3-tokenizer", "4-shards", "5-plan", "6-pretrain"]


def test_killed_in_training_it_ends_with_the_same_weights(made: Path, story: Path, tmp_path: Path) -> None:
    """The plan's steps are given, so an undisturbed run of the same recipe is the measure."""
    out = tmp_path / "killed"
    more = ("--pretrain.save-every", "4", "--sft.save-every", "4", "--sft.lr", "1e-3")
    for stage in ("6-pretrain", "7-sft"):
        process = subprocess.Popen(command(out, story, *more, "--quiet"), env=environment())
        checkpoints = out / stage / "checkpoints"
        until = time.monotonic() + 120
        while not list(checkpoints.glob("step-*")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / stage / "done.json").exists()
    done = quickstart(out, story, *more)
    assert done.returncode == 0, done.stderr
    whole = quickstart(tmp_path / "whole", story, *more)
    assert whole.returncode == 0, whole.stderr
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_missing_text_is_one_paragraph_and_exit_code_2(tmp_path: Path) -> None:
    failed = quickstart(tmp_path / "out", tmp_path / "nothing.txt")
    assert failed.returncode == 2
    assert "nothing.txt does not exist" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_unknown_option_names_its_neighbour(tmp_path: Path, story: Path) -> None:
    failed = quickstart(tmp_path / "out", story, "--minuts", "3")
    assert failed.returncode == 2
    assert "minutes" in failed.stderr
