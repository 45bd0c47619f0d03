"""The whole way on the command line, as a user goes it: text, tokenizer, shards, pretraining, preview, fine-tuning."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUESTIONS = [("What is two plus two?", "Four."), ("二加二等于几？", "四。"), ("Who are you?", "A small model 小模型.")]
SMALL = """--model.depth 2 --model.width 64 --model.heads 2 --model.hidden 128 --model.max-positions 128
    --objective.seq-len 64 --train.precision fp32 --train.device cpu"""


def command(words: str) -> list[str]:
    return [sys.executable, "-m", "hanlin", *words.split()]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}


def hanlin(folder: Path, words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(words), cwd=folder, capture_output=True, text=True, env=environment(), timeout=300, encoding="utf-8"
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A working directory with a user's text, conversations, the repository's recipes, a tokenizer and shards."""
    folder = tmp_path_factory.mktemp("workshop")
    lines = ["Two plus two is four; three plus three is six. ", "二加二等于四，三加三等于六。"]
    (folder / "text.txt").write_text("\n".join(line * 8 for line in lines * 60), encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in QUESTIONS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    hanlin(folder, "tokenizer train text.txt chat.jsonl --vocab-size 400 --out runs/tokenizer")
    hanlin(folder, "data build recipes/data.yaml --sources.0.paths text.txt --quiet")
    return folder


def test_the_recipes_of_the_repository_lead_from_text_to_a_model_that_answers(workshop):
    seen = hanlin(workshop, "data preview recipes/pretrain-tiny.yaml --rows 1 --objective.seq-len 64")
    assert "text.txt" in seen.stdout and "tokens trained" in seen.stdout
    done = hanlin(workshop, f"train recipes/pretrain-tiny.yaml {SMALL} --train.steps 30 --objective.held-out runs/data")
    assert "hanlin generate runs/pretrain-tiny/model" in done.stdout
    logged = [json.loads(line) for line in (workshop / "runs/pretrain-tiny/metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in logged if "eval/loss" in row]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5
    assert all(row["eval/bits_per_byte"] > 0 for row in logged if "eval/loss" in row)

    seen = hanlin(workshop, "data preview recipes/sft-tiny.yaml").stdout
    assert all(f"⟦{answer}<|im_end|>⟧" in seen for _, answer in QUESTIONS)
    done = hanlin(workshop, "train recipes/sft-tiny.yaml --quiet --train.steps 120 --train.batch-size 2")
    assert "hanlin chat runs/sft-tiny/model" in done.stdout and done.stderr == ""

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(workshop / "runs/sft-tiny/model")
    tokenizer = AutoTokenizer.from_pretrained(workshop / "runs/sft-tiny/model")
    for question, answer in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        told = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(told, skip_special_tokens=True) == answer


def test_a_terminated_run_says_how_to_go_on_and_does(workshop):
    words = command(f"train recipes/pretrain-tiny.yaml --name stopped {SMALL} --train.steps 4000")
    process = subprocess.Popen(
        words, cwd=workshop, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    metrics = workshop / "runs/stopped/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Stopped after step" in told and "To go on: hanlin train recipes/pretrain-tiny.yaml --name stopped" in told
    assert not (workshop / "runs/stopped/model").exists()
    step = int(told.split("Stopped after step ")[1].split(";")[0])
    assert 0 < step < 4000 and (workshop / f"runs/stopped/checkpoints/step-{step}").is_dir()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train recipes/pretrain-tiny.yaml --nproc 0", "is no whole number of 1 or more"),
        ("train recipes/pretrain-tiny.yaml --nproc=2 --parallel.tensor 4", "do not divide the 2 processes"),
        ("train recipes/pretrain-tiny.yaml --restarts 1", "give --nproc too"),
        ("train recipes/pretrain-tiny.yml", "Did you mean recipes/pretrain-tiny.yaml?"),
        ("train recipes/pretrain-tiny.yaml --train.lrr 1", "train.lr"),
        ("train --quiet", "RECIPE"),
        ("train recipes/pretrain-tiny.yaml --tokenizer runs/absent", "runs/absent"),
        ("train recipes/pretrain-tiny.yaml --objective.shards.0.path runs/absent", "runs/absent"),
        ("train recipes/sft-tiny.yaml --model.path runs/absent", "runs/absent"),
        ("data preview recipes/pretrain-tiny.yaml --rows 0", "--rows is at least 1"),
        ("data preview recipes/sft-tiny.yaml --model.path runs/absent", "runs/absent"),
    ],
)
def test_a_mistake_is_one_paragraph(workshop, words, told):
    assert told in hanlin(workshop, words, code=2).stderr


def test_help_needs_no_recipe_and_no_torch(workshop):
    watch = "import sys, hanlin.cli; code = hanlin.cli.main(['train', '--help']); assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", f"try:\n exec({watch!r})\nexcept SystemExit as end:\n assert not end.code\n"]
    done = subprocess.run([*words], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    assert "hanlin train recipes/sft-tiny.yaml" in done.stdout
    listed = hanlin(workshop, "train recipes/sft-tiny.yaml --help").stdout
    assert "--objective.files" in listed and "--train.lr" in listed


def test_two_processes_train_what_one_trains_and_write_one_model(workshop):
    words = f"train recipes/pretrain-tiny.yaml {SMALL} --train.steps 6 --train.log-every 1 --quiet --train.batch-size 4"
    hanlin(workshop, f"{words} --name one")
    hanlin(workshop, f"{words} --name two --nproc 2 --parallel.tensor 2")
    losses = [
        [json.loads(line)["loss"] for line in (workshop / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    told = hanlin(workshop, "generate runs/two/model Two --max-tokens 4 --temperature 0").stdout
    assert told == hanlin(workshop, "generate runs/one/model Two --max-tokens 4 --temperature 0").stdout
