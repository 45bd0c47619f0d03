"""The two writers: the own engine, and an OpenAI-compatible server over real HTTP, which answer alike."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.serve.tiny import make_actor, make_folder, serving

from hanlin.align.synthesis.rounds import user
from hanlin.align.synthesis.writers import EndpointWriter, EngineWriter
from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams

ROOT = Path(__file__).parents[3]
LINES = [("What is 20+22?", "It is 42."), ("二加二等于几？", "四。"), ("Say 7", "7 7 7")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, seed=0)


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    scenes = [(user(question), [], answer) for question, answer in LINES]
    return make_actor(tmp_path_factory.mktemp("models") / "actor", scenes)


@pytest.fixture(scope="module")
def engine(actor):
    with Engine.from_folder(actor, dtype="float32") as engine:
        yield engine


def test_engine_and_server_give_the_answers_that_the_model_knows(engine):
    chats = [user(question) for question, _ in LINES] * 3
    expected = [answer for _, answer in LINES] * 3
    assert EngineWriter(engine, "actor").ask(chats, GREEDY) == expected
    with serving({"actor": engine}) as address, EndpointWriter(f"{address}/v1", "actor", concurrency=4) as writer:
        assert writer.ask(chats, GREEDY) == expected


def test_draws_follow_from_the_seed_and_the_place_alone(engine):
    hot = SamplingParams(temperature=5.0, max_tokens=8, seed=3)
    writer = EngineWriter(engine, "actor")
    four = writer.ask([user("Say 7")] * 4, hot, cut=True)
    assert len(set(four)) == 4 and writer.ask([user("Say 7")] * 2, hot, cut=True) == four[:2]


def test_an_answer_cut_short_and_a_question_too_long_are_no_answers(actor):
    short = SamplingParams(temperature=0.0, max_tokens=2, seed=0)
    with Engine.from_folder(actor, max_context=64) as engine:
        chats = [user("Say 7"), user("word " * 100)]
        assert EngineWriter(engine, "actor").ask(chats, short) == [None, None]
        kept, too_long = EngineWriter(engine, "actor").ask(chats, short, cut=True)
        assert kept and too_long is None
        with serving({"actor": engine}) as address, EndpointWriter(f"{address}/v1", "actor") as writer:
            assert writer.ask(chats, short, cut=True) == [kept, None]


def test_a_model_without_a_template_or_without_a_voice_is_refused(tmp_path):
    folder = make_folder(tmp_path / "mute")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(HanlinError, match="mute has no chat template"):
        EngineWriter.open(folder)


class Moody(BaseHTTPRequestHandler):
    """Answers with what `server.moods` says, one a request; then always well."""

    def do_POST(self) -> None:
        self.server.heard.append((self.headers["Authorization"], json.loads(self._body())))
        status = self.server.moods.pop(0) if self.server.moods else 200
        told = {"error": {"message": f"mood {status}"}}
        if status == 200:
            message = {"role": "assistant", "content": " fine "}
            told = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
        data = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def moody():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    server.moods, server.heard = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def moody_writer(server, **options) -> EndpointWriter:
    return EndpointWriter(f"http://127.0.0.1:{server.server_port}/v1", "m", **options)


def test_busy_servers_are_asked_again_with_the_key_of_the_environment(moody, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    moody.moods = [429, 503, 500]
    with moody_writer(moody, concurrency=1) as writer:
        assert writer.ask([user("你好")], SamplingParams(temperature=0.5, max_tokens=9, seed=1)) == ["fine"]
    assert len(moody.heard) == 4
    key, body = moody.heard[-1]
    assert key == "Bearer secret-7"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0.5)
    assert body["messages"] == user("你好") and 0 <= body["seed"] < 2**31


def test_one_refused_chat_is_no_answer_and_all_refused_is_an_error(moody):
    moody.moods = [400]
    with moody_writer(moody, concurrency=1, retries=0) as writer:
        assert writer.ask([user("a"), user("b")], GREEDY) == [None, "fine"]
        moody.moods = [503, 400]
        with pytest.raises(HanlinError, match=r"answered none of 2 requests for the model 'm'.*503"):
            writer.ask([user("a"), user("b")], GREEDY)


@pytest.mark.parametrize(
    ("status", "told"), [(401, "refuses the key .401..*OPENAI_API_KEY"), (404, "knows no model 'm'.*writer.model")]
)
def test_a_wrong_key_and_a_wrong_model_are_named(moody, status, told):
    moody.moods = [status] * 3
    with moody_writer(moody) as writer, pytest.raises(HanlinError, match=told):
        writer.ask([user("a")] * 3, GREEDY)


def test_an_unreachable_server_is_named_with_what_to_check():
    with (
        EndpointWriter("http://127.0.0.1:9/v1", "m", retries=0) as writer,
        pytest.raises(HanlinError, match=r"http://127.0.0.1:9/v1 cannot be reached .*writer.url"),
    ):
        writer.ask([user("a")], GREEDY)


RECIPE = """
name: made
seeds: [sums.jsonl]
writer: {kind: engine, path: MODEL, dtype: float32, max_batch: 8}
method: {kind: rejection, answers: 3, verifier: "judge:likes", batch: 2}
sampling: {temperature: 1.0, max_tokens: 24, cut: true}
"""


def workshop(folder: Path, actor: Path) -> Path:
    folder.mkdir()
    rows = [{"question": f"{a} 加 {a + 1}?"} for a in range(24)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(actor)), encoding="utf-8")
    (folder / "judge.py").write_text("def likes(question, answer, reference):\n    return len(answer) % 2\n")
    return folder


def hanlin(folder: Path, words: str, **options) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, "-m", "hanlin", *words.split()], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **options,
    )  # fmt: skip


def run(folder: Path, words: str, code: int = 0) -> tuple[str, str]:
    process = hanlin(folder, words)
    told, errors = process.communicate(timeout=120)
    assert process.returncode == code, told + errors
    assert "Traceback" not in errors
    return told, errors


@pytest.mark.slow
def test_kill_9_in_the_middle_and_the_same_command_gives_the_same_file(tmp_path, actor):
    calm, wild = workshop(tmp_path / "calm", actor), workshop(tmp_path / "wild", actor)
    told, _ = run(calm, "data synthesize recipe.yaml --quiet")
    assert "runs/made/conversations.jsonl: " in told and "not right" in told
    log, kills = wild / "runs/made/rounds.jsonl", 0
    for wanted in (1, 5, 9):
        process = hanlin(wild, "data synthesize recipe.yaml --quiet")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.005)
        process.communicate()
    assert kills >= 1
    run(wild, "data synthesize recipe.yaml --quiet")
    files = [folder / "runs/made/conversations.jsonl" for folder in (calm, wild)]
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].stat().st_size


def test_the_command_says_what_is_wrong(tmp_path, actor):
    folder = workshop(tmp_path / "shop", actor)
    assert "Which recipe?" in run(folder, "data synthesize", code=2)[1]
    assert "method.answerss" in run(folder, "data synthesize recipe.yaml --method.answerss 3", code=2)[1]
    (folder / "recipe.yaml").write_text(
        RECIPE.replace("{kind: engine, path: MODEL, dtype: float32, max_batch: 8}",
                       '{kind: endpoint, url: "http://127.0.0.1:9/v1", model: m, retries: 0}')
    )  # fmt: skip
    assert "cannot be reached" in run(folder, "data synthesize recipe.yaml --quiet", code=2)[1]
    assert "--method.answers" in run(folder, "data synthesize recipe.yaml --help")[0]
