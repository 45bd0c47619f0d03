"""Offline is a promise: the default path of every command runs with nothing but loopback, and tries nothing else.

Two guards. Every Python process, workers too, has an audit hook that refuses and records each look-up and connection to
anything but this machine; where the system allows, the commands also run in a network namespace that holds only `lo`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from openai import OpenAI

from hanlin.cli import VERBS

GUARD = """
import os, sys

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")

def guard(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[-1]
        if not isinstance(address, tuple):  # a Unix socket, or an already connected one
            return
        host = address[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and not host.startswith(LOOPBACK):
        with open(os.environ["HANLIN_TEST_CALLS"], "a") as record:
            record.write(f"{event} {host} by {sys.argv}\\n")
        raise ConnectionRefusedError(f"offline test: {event} {host}")

sys.addaudithook(guard)
"""
PRETRAIN = """
name: pretrain
tokenizer: tokenizer
model: {kind: new, depth: 2, width: 32, heads: 2, kv_heads: 1, hidden: 64}
objective: {kind: causal_lm, shards: [{path: shards}], seq_len: 32}
train: {steps: 3, batch_size: 4}
"""
SFT = """
name: sft
model: {kind: saved, path: runs/pretrain/model}
objective: {kind: sft, files: [chat.json], seq_len: 32}
train: {steps: 3, batch_size: 4}
"""
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


class Offline:
    """A folder in which commands run without a network; `calls` is what they tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "calls.txt"
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        cache = {"HF_HOME": str(folder / "cache"), "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder)}
        own = {"PYTHONPATH": str(folder / "guard"), "HANLIN_TEST_CALLS": str(self.record)}
        self.environment = {**kept, **cache, **own}
        self.alone = ALONE if shutil.which("unshare") and self._works([*ALONE, "true"]) else []

    def python(self, *argv: str, typed: str = "", alone: bool = True) -> subprocess.CompletedProcess[str]:
        command = [*(self.alone if alone else []), sys.executable, *argv]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, input=typed, capture_output=True, text=True, timeout=600
        )

    def hanlin(self, *argv: str, typed: str = "") -> str:
        done = self.python("-m", "hanlin", *argv, typed=typed)
        assert done.returncode == 0, f"hanlin {' '.join(argv)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    @property
    def calls(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []

    @staticmethod
    def _works(command: Sequence[str]) -> bool:
        return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def offline(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n\n猫坐在垫子上。def f(x): return x + 1\n\n" * 200)
    return Offline(tmp_path)


def test_the_guard_refuses_and_records_every_way_out(offline):
    tries = {
        "import urllib.request as r; r.urlopen('http://example.com', timeout=2)": "example.com",
        "import socket; socket.create_connection(('192.0.2.1', 80), 2)": "192.0.2.1",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.2', 9))": "192.0.2.2",
        "import httpx; httpx.get('http://192.0.2.3')": "192.0.2.3",
    }
    for code in tries:
        assert offline.python("-c", code, alone=False).returncode != 0
    assert [call.split()[1] for call in offline.calls] == list(tries.values())
    assert "example.com" in offline.calls[0]


def test_loopback_stays_open(offline):
    code = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(("localhost", server.getsockname()[1]), 5)
"""
    done = offline.python("-c", code)
    assert done.returncode == 0, done.stderr
    assert offline.calls == []


def test_text_to_tokens_to_a_model_that_speaks(offline):
    offline.hanlin("--help")
    offline.hanlin("schema", "train")
    offline.hanlin("tokenizer", "train", "text.txt", "--vocab-size", "400", "--out", "tokenizer")
    offline.hanlin("tokenizer", "show", "The cat 猫", "--tokenizer", "tokenizer")
    size = ["--layers", "2", "--width", "32", "--heads", "2", "--kv-heads", "1", "--hidden", "64"]
    offline.hanlin("model", "new", *size, "--tokenizer", "tokenizer", "--out", "model")
    offline.hanlin("model", "show", "model")
    offline.hanlin("pull", "--list")
    offline.hanlin("eval", "model", "--text", "text.txt", "--sample", "The", "--max-tokens", "4")
    offline.hanlin("generate", "model", "The cat", "--max-tokens", "4")
    offline.hanlin("chat", "model", "--max-tokens", "4", typed="你好\n")
    assert offline.calls == []


def test_the_server_and_its_page(offline):
    offline.hanlin("tokenizer", "train", "text.txt", "--vocab-size", "400", "--out", "tokenizer")
    size = ["--layers", "2", "--width", "32", "--heads", "2", "--kv-heads", "1", "--hidden", "64"]
    offline.hanlin("model", "new", *size, "--tokenizer", "tokenizer", "--out", "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Not in a namespace of its own: this test is the client.
    process = subprocess.Popen(
        [sys.executable, "-m", "hanlin", "serve", "model", "--port", str(port)],
        cwd=offline.folder,
        env=offline.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        page = wait_for(f"{address}/", process)
        assert "<html" in page
        with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            said = client.chat.completions.create(
                model="model", messages=[{"role": "user", "content": "你好"}], max_tokens=4
            )
        assert said.usage is not None
        assert said.usage.completion_tokens > 0
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert offline.calls == []


def test_shards_a_preview_and_both_kinds_of_training(offline):
    rows = [{"instruction": "What is 一?", "input": "", "output": "One."}] * 8
    (offline.folder / "chat.json").write_text(json.dumps(rows))
    (offline.folder / "data.yaml").write_text("{out: shards, tokenizer: tokenizer, sources: [{paths: [text.txt]}]}")
    (offline.folder / "pretrain.yaml").write_text(PRETRAIN)
    (offline.folder / "sft.yaml").write_text(SFT)
    offline.hanlin("tokenizer", "train", "text.txt", "--vocab-size", "400", "--out", "tokenizer")
    offline.hanlin("data", "build", "data.yaml")
    offline.hanlin("data", "preview", "pretrain.yaml")
    offline.hanlin("train", "pretrain.yaml")
    offline.hanlin("data", "preview", "sft.yaml")
    offline.hanlin("train", "sft.yaml")
    assert (offline.folder / "runs" / "sft" / "model" / "config.json").exists()
    offline.hanlin("runs", "list")
    offline.hanlin("plan", "pretrain.yaml")
    offline.hanlin("scaling", "--help")
    offline.hanlin("rl", "FrozenLake-v1", "--method", "value-iteration", "--quiet")
    offline.hanlin("data", "problems", "--out", "problems", "--train", "20", "--held-out", "5")
    assert offline.calls == []


@pytest.mark.slow
def test_the_quickstart(offline, own_words):
    (offline.folder / "words.txt").write_text(own_words, encoding="utf-8")
    offline.hanlin("quickstart", "--minutes", "0.3", "--text", "words.txt", "--out", "made", "--no-serve")
    assert (offline.folder / "made" / "report.md").exists()
    assert offline.calls == []


def test_every_verb_is_covered_here():
    source = Path(__file__).read_text(encoding="utf-8")
    missing = [verb for verb in VERBS if f'hanlin("{verb}"' not in source and f'"hanlin", "{verb}"' not in source]
    assert missing == []


def wait_for(address: str, process: subprocess.Popen[str], seconds: float = 120) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not come up: {process.communicate(timeout=5)[1] if process.poll() else ''}")
