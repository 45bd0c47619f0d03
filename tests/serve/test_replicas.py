"""`hanlin serve --replicas 2` on Ray Serve, for real: its processes, one killed under load, its end."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from tests.serve.tiny import post, wait_until

pytestmark = pytest.mark.slow
PROGRAM = "import sys; from hanlin.cli import main; sys.exit(main(sys.argv[1:]))"
BODY = {"max_tokens": 600, "ignore_eos": True, "temperature": 1.0}


@contextlib.contextmanager
def command(*arguments):
    """`hanlin serve` in a process group of its own, as a terminal would start it."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # harmless when it has ended


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("hanlin-ray-*"))


def replicas_of(process) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if one.is_running() and "ServeReplica" in "".join(one.cmdline())]


def ready(process) -> str:
    said = ""
    for line in process.stderr:
        if match := re.search(r"http://\S+", line):
            return match[0]
        said += line
    raise AssertionError(f"it did not start: {said}")


@pytest.fixture(scope="module")
def server(folder):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    before = folders()
    with command(folder, "--replicas", 2, "--port", 0, "--no-page", "--name", "tiny", "--device", "cpu") as process:
        yield process, ready(process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 4
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches all processes of the terminal's group
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert folders() <= before


def test_only_this_machine_is_spoken_to(server):
    process, address = server
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(replicas_of(process)) == 2
    peers = {c.raddr.ip for one in family for c in one.net_connections("inet") if c.raddr}
    assert peers and {peer.removeprefix("::ffff:") for peer in peers} == {"127.0.0.1"}
    open_to_all = [
        c.laddr.port
        for one in family
        for c in one.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.ip.removeprefix("::ffff:") != "127.0.0.1"
    ]
    for port in open_to_all:  # a replica's port for other replicas asks for this run's certificate
        with pytest.raises((httpx.TransportError, OSError)):
            httpx.get(f"http://127.0.0.1:{port}/", timeout=5)
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "replicas": 2}


def test_prompts_that_begin_alike_find_their_pages(server):
    _, address = server
    hits = []
    for group in range(6):
        beginning = f"第{group}卷 " + "读和写是一枚硬币的两面。" * 100
        for question in "abc":
            answer = post(address, "/v1/completions", {"prompt": beginning + question, "max_tokens": 1}).json()
            hits.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 500)
    assert hits == [False, True, True] * 6
    text = httpx.get(f"{address}/metrics").text
    counts = [int(n) for n in re.findall(r"vllm:e2e_request_latency_seconds_count\{.*\} (\d+)", text)]
    assert sum(counts) == 18 and all(count % 3 == 0 for count in counts)


def running(address) -> list[int]:
    """Requests being computed, replica by replica."""
    text = httpx.get(f"{address}/metrics", timeout=30).text
    return [int(n) for n in re.findall(r"vllm:num_requests_running\{.*\} (\d+)", text)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(server, stream):
    _, address = server
    body = BODY | {"prompt": "leaves", "max_tokens": 4000, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=httpx.Timeout(30, read=1.0)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        assert sum(running(address)) == 1
    wait_until(lambda: sum(running(address)) == 0, seconds=3)


def ask(address: str, number: int) -> str:
    """How one request ends: "whole", "answered" after all, or cleanly with an error."""
    body = BODY | {"prompt": f"{number} 号 prompt", "stream": bool(number % 2)}
    try:
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as response:
            text = response.read().decode()
            if response.status_code != 200:
                return json.loads(text)["error"]["code"]
    except httpx.RemoteProtocolError:
        return "cut off"
    if not number % 2:
        return "whole" if json.loads(text)["usage"]["completion_tokens"] == BODY["max_tokens"] else text
    last = [line.removeprefix("data: ") for line in text.splitlines() if line][-1]
    return "whole" if last == "[DONE]" else json.loads(last)["error"]["code"]


def test_one_killed_under_load_costs_only_its_own_requests_and_comes_back(server, capsys):
    process, address = server
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        under_way = [pool.submit(ask, address, number) for number in range(24)]
        wait_until(lambda: min(running(address)) >= 3)
        victim = replicas_of(process)[0]
        start = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        first = ask(address, 1000)
        answered = time.monotonic() - start
        ends = [one.result(timeout=30) for one in under_way]
        settled = time.monotonic() - start
        wait_until(lambda: httpx.get(f"{address}/health", timeout=30).json().get("replicas") == 2, seconds=30)
        restored = time.monotonic() - start
    assert first == "whole"
    assert set(ends) <= {"whole", "replica_lost"} and ends.count("whole") >= 12
    numbers = {pid.pid for pid in replicas_of(process)}
    assert victim.pid not in numbers and len(numbers) == 2
    with capsys.disabled():
        print(
            f"\n  a replica killed under load: next request answered after {answered:.2f} s, {ends.count('whole')} of "
            f"{len(ends)} answered and {ends.count('replica_lost')} ended with an error within {settled:.2f} s, two "
            f"replicas again after {restored:.2f} s"
        )
    assert answered < 10 and restored < 10
    assert [ask(address, number) for number in range(8)] == ["whole"] * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--replicas", "0", "--no-page"), "--replicas is 0"),
        (("--replicas", "2"), "--no-page"),
        (("--replicas", "2", "--no-page", "--adapter-root", "."), "--adapter NAME=FOLDER"),
        (("--replicas", "1", "--no-page", "--max-batch", "0"), "max_batch is 0"),
    ],
)
def test_what_cannot_be_is_one_paragraph(folder, arguments, message):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    with command(folder, "--port", 0, "--device", "cpu", *arguments) as process:
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert message in error and "Traceback" not in error


def test_the_replicas_end_when_the_server_itself_is_killed(folder):
    """Its two agents look for the rest of Ray for a minute before they believe it."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    before = folders()
    with command(folder, "--replicas", 1, "--port", 0, "--no-page", "--device", "cpu") as process:
        ready(process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(replicas_of(process)) == 1
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert {one.name() for one in alive} <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
        for one in alive:
            one.kill()
    for left in folders() - before:
        shutil.rmtree(left)
