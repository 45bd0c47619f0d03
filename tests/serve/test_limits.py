"""Keys with their limits, answers that take too long, and a server that goes down in peace."""

import concurrent.futures
import json
import re
import signal
import threading
import time

import httpx
import pytest
from tests.serve.test_running import LONG, HeldStreams, command, running
from tests.serve.tiny import post, serving, wait_until

from hanlin.cli.serve import main
from hanlin.core.errors import HanlinError
from hanlin.serve.errors import ApiError
from hanlin.serve.limits import Account, Gate, Key, read_keys

SHORT = {"prompt": "a b", "max_tokens": 2, "ignore_eos": True}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_read_from_lines(tmp_path):
    file = tmp_path / "keys.jsonl"
    file.write_text(
        '{"key": "开门", "name": "alice", "max_concurrent": 2}\n\n{"key": "b", "adapters": ["x"]}\n', "utf-8"
    )
    assert read_keys(file) == [Key("开门", "alice", max_concurrent=2), Key("b", "3", adapters=("x",))]
    for wrong, words in (
        ("{", "line 1"),
        ('{"name": "a"}', '"key"'),
        ('{"key": ""}', "empty"),
        ('{"key": "a", "colour": 1}', "colour"),
        ('{"key": "a", "max_concurrent": 0}', "max_concurrent"),
        ('{"key": "a"}\n{"key": "a"}', "line 2"),
        ("", "no keys"),
    ):
        file.write_text(wrong, "utf-8")
        with pytest.raises(HanlinError, match=words):
            read_keys(file)
    with pytest.raises(HanlinError, match="not a file"):
        read_keys(tmp_path / "none")


def test_a_minutes_tokens_come_back_as_they_pass():
    now = 0.0
    account = Account(Key("a", tokens_per_minute=100), clock=lambda: now)
    account.charge(60)
    account.check()
    now = 20.0
    account.charge(70)
    with pytest.raises(ApiError, match="130 tokens") as refused:
        account.check()
    assert refused.value.status == 429 and refused.value.retry_after == 40  # when the first 60 are a minute old
    now = 59.0
    with pytest.raises(ApiError):
        account.check()
    now = 60.0
    account.check()
    now = 81.0
    account.check()
    assert account.used == 0


def test_each_key_has_its_own_allowance(engine):
    keys = [Key("a", "alice", tokens_per_minute=10), Key("b", "bob")]
    with serving({"tiny": engine}, keys=keys) as address:
        for _ in range(3):
            assert post(address, "/v1/completions", SHORT, headers=bearer("a")).status_code == 200
        refused = post(address, "/v1/completions", SHORT, headers=bearer("a"))
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert post(address, "/v1/completions", SHORT, headers=bearer("b")).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers=bearer("a")).status_code == 200  # looking costs nothing
        assert post(address, "/v1/embeddings", {"input": "a"}, headers=bearer("a")).status_code == 429


def test_requests_at_once_are_counted_until_their_last_byte(engine):
    with serving({"tiny": engine}, keys=[Key("a", max_concurrent=1), Key("b")]) as address:
        with httpx.stream(
            "POST", f"{address}/v1/completions", json=LONG | {"stream": True}, headers=bearer("a"), timeout=60
        ) as response:
            lines = response.iter_lines()  # kept: when it goes, the connection goes
            next(lines)
            refused = post(address, "/v1/completions", SHORT, headers=bearer("a"))
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_requests"
            assert post(address, "/v1/completions", SHORT, headers=bearer("b")).status_code == 200
        wait_until(lambda: running(engine) == 0)
        wait_until(lambda: post(address, "/v1/completions", SHORT, headers=bearer("a")).status_code == 200)


def test_a_refused_body_gives_its_place_back(engine):
    with serving({"tiny": engine}, keys=[Key("a", max_concurrent=1)]) as address:
        for _ in range(3):
            assert post(address, "/v1/completions", {"prompt": 5}, headers=bearer("a")).status_code == 400
        assert post(address, "/v1/completions", SHORT, headers=bearer("a")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(engine, stream):
    with serving({"tiny": engine}, request_seconds=0.2) as address:
        response = post(address, "/v1/completions", LONG | {"stream": stream})
        if stream:
            error = json.loads(response.text.splitlines()[-2].removeprefix("data: "))["error"]
            assert "[DONE]" not in response.text
        else:
            assert response.status_code == 408
            error = response.json()["error"]
        assert error["code"] == "timeout"
        wait_until(lambda: running(engine) == 0)
        assert post(address, "/v1/completions", SHORT).status_code == 200


def test_a_closed_gate_lets_nobody_in():
    gate = Gate([Key("a")])
    account = gate.account("a")
    gate.enter(account)
    gate.closed = True
    with pytest.raises(ApiError) as refused:
        gate.enter(account)
    assert refused.value.status == 503
    gate.leave(account)
    assert gate.open == account.open == 0


def test_sigterm_lets_answers_end_and_takes_no_new_ones(folder):
    with command(folder, "--port", 0, "--no-page", "--drain", 30) as process:
        address = re.search(r"http://\S+", process.stderr.readline())[0]
        wait_until(lambda: is_up(address), seconds=60)
        lines = []

        def listen():
            body = LONG | {"stream": True, "max_tokens": 1500}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
                lines.extend(response.iter_lines())

        listener = threading.Thread(target=listen)
        with httpx.Client(base_url=address) as waiting:  # a connection that is open already
            assert waiting.get("/health").status_code == 200
            listener.start()
            wait_until(lambda: 'num_requests_running{model_name="tiny"} 1' in waiting.get("/metrics").text)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: waiting.get("/health").status_code == 503, seconds=10)
            refused = waiting.post("/v1/completions", json=SHORT)
            assert refused.status_code == 503 and refused.headers["retry-after"]
        listener.join(timeout=60)
        assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
        rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


def test_an_answer_that_does_not_end_is_cut_after_the_drain(folder):
    with command(folder, "--port", 0, "--no-page", "--drain", 0.5) as process:
        address = re.search(r"http://\S+", process.stderr.readline())[0]
        wait_until(lambda: is_up(address), seconds=60)
        with concurrent.futures.ThreadPoolExecutor(2) as pool, HeldStreams() as streams:
            held = [pool.submit(streams.open, address) for _ in range(2)]
            wait_until(lambda: 'num_requests_running{model_name="tiny"} 2' in httpx.get(f"{address}/metrics").text)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=30)[1]
            assert time.monotonic() - began < 15
            concurrent.futures.wait(held, timeout=30)
    assert process.returncode == 0, rest


def is_up(address) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_wrong_options_are_said_before_a_model_is_read(tmp_path, folder):
    keys = tmp_path / "k"
    keys.write_text('{"key": "a"}', "utf-8")
    for arguments, message in (
        ((folder, "--key-file", keys), "--no-page"),
        ((folder, "--no-page", "--key-file", "none"), "none is not a file"),
        ((folder, "--no-page", "--timeout", "0"), "--timeout is 0.0"),
        ((folder, "--no-page", "--adapter", "x"), "NAME=FOLDER"),
        ((folder, "--no-page", "--adapter-root", "none"), "none is not a folder"),
    ):
        with pytest.raises(HanlinError, match=message):
            main([str(argument) for argument in arguments])
