"""Checks that others wrote: llm-comply's cases, schemathesis over our own schema, llama-benchy's load."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.serve.tiny import TEXT, make_actor, serving

from hanlin.engine import Engine

# What these would need is refused by name: pictures, and conversations that are compacted.
ASIDE = ("image", "compact")
CITY = {"type": "string", "description": "City name"}
WEATHER = {
    "name": "get_weather",
    "description": "Get current weather for a location.",
    "parameters": {"type": "object", "properties": {"location": CITY}, "required": ["location"]},
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"location": "SF"}}</tool_call>'


def said(*texts: str) -> list[dict]:
    """Turns of the user and the assistant by turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def scenes():
    """The conversations of llm-comply, with an answer that ends, as a chat model's does."""
    system = [{"role": "system", "content": "Always respond in exactly one word."}]
    name = "What is my name? Reply with just the name."
    talks = [
        said("Say hello in exactly 3 words."),
        [*system, *said("Say hello.")],
        said("My name is Alice.", "Hello Alice!", name),
        said("Count from 1 to 5."),
        said("Say one word."),
        [
            {"role": "assistant", "content": "I should answer with the saved number."},
            {"role": "assistant", "content": "The number is four."},
            *said("Repeat only the number."),
        ],
    ]
    tools = [{"type": "function", "function": WEATHER}]
    weather = said("What is the weather in San Francisco?")
    return [*((talk, [], "fox dog") for talk in talks), (weather, tools, CALL)]


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    """A model that knows the answers to llm-comply's questions."""
    folder = make_actor(tmp_path_factory.mktemp("conformance") / "actor", scenes())
    with Engine.from_folder(folder) as engine, serving({"actor": engine}) as address:
        yield address


@pytest.mark.parametrize("form", ["openai-chat", "open-responses", "anthropic"])
def test_llm_comply_finds_nothing(actor, form):
    comply = pytest.importorskip("llm_comply.tests")
    wanted = [case.id for case in comply.get_tests(form) if not any(word in case.id for word in ASIDE)]
    assert len(wanted) >= 6
    command = [
        sys.executable,
        "-m",
        "llm_comply.cli",
        "--base-url",
        f"{actor}/v1",
        "--api-key",
        "x",
        "--model",
        "actor",
    ]
    command += ["--format", form, "--json", "--filter", ",".join(wanted)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(result.stdout)
    failed = [case for case in report["results"] if case["status"] not in ("passed", "skipped")]
    assert not failed, json.dumps(failed, indent=1)[:4000]
    passed = [case for case in report["results"] if case["status"] == "passed"]
    assert len(passed) >= len(wanted) - 1  # reasoning is asked of models with certain names only
    assert result.returncode == 0


def test_schemathesis_finds_no_server_error(folder):
    schemathesis = pytest.importorskip("schemathesis")
    with Engine.from_folder(folder, max_batch=8, max_context=64) as engine, serving({"tiny": engine}) as address:
        schema = schemathesis.openapi.from_dict(httpx.get(f"{address}/openapi.json").json())
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 20
        for operation in operations:

            @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy())
            def no_server_error(case):
                response = case.call(base_url=address, timeout=60)
                assert response.status_code < 500, (case.method, case.path, case.body, response.text)

            no_server_error()


class Book(BaseHTTPRequestHandler):
    """The text that llama-benchy reads, instead of a book from elsewhere."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write((TEXT * 50).encode())

    def log_message(self, *_):
        pass


def test_llama_benchy_measures_the_server(actor, folder, tmp_path):
    pytest.importorskip("llama_benchy")
    shelf = HTTPServer(("127.0.0.1", 0), Book)
    threading.Thread(target=shelf.serve_forever, daemon=True).start()
    try:
        command = [sys.executable, "-m", "llama_benchy", "--base-url", f"{actor}/v1", "--model", "actor"]
        command += ["--tokenizer", str(folder), "--book-url", f"http://127.0.0.1:{shelf.server_port}/book.txt"]
        command += ["--pp", "64", "--tg", "16", "--runs", "1", "--concurrency", "2", "--skip-coherence"]
        command += ["--save-result", str(tmp_path / "result.json"), "--format", "json"]
        environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    finally:
        shelf.shutdown()
        shelf.server_close()
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    assert "actor" in (tmp_path / "result.json").read_text()


@pytest.mark.slow
def test_lm_eval_scores_as_the_model_does(folder, tmp_path):
    """`local-completions` (echo and logprobs) over a task of our own: the accuracy is that of the model's logits."""
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    questions = [
        ("The quick brown", [" fox", " coin", "狗"]),
        ("读和写是", ["一枚硬币", "懒狗", " dog"]),
        ("def add(a,", [" b", "x"]),
    ]
    lines = [json.dumps({"q": q, "choices": c, "gold": 0}, ensure_ascii=False) for q, c in questions * 3]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "ours.yaml").write_text(json.dumps(task), encoding="utf-8")
    with Engine.from_folder(folder) as engine, serving({"tiny": engine}) as address:
        arguments = f"model=tiny,base_url={address}/v1/completions,tokenizer={folder},num_concurrent=2,max_retries=1"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", "ours", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
        environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def likelihood(question: str, choice: str) -> float:
        whole = tokenizer(question + choice)["input_ids"]
        begin = len(tokenizer(question)["input_ids"])
        with torch.no_grad():
            rows = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(rows[place - 1, whole[place]]) for place in range(begin, len(whole)))

    right = sum(max(choices, key=lambda c: likelihood(q, c)) == choices[0] for q, choices in questions)
    assert report["results"]["ours"]["acc,none"] == pytest.approx(right / len(questions))
