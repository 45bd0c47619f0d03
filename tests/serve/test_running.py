"""A server at work: many at once, clients that leave, a full queue, figures for dashboards, a taken port."""

import asyncio
import concurrent.futures
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import openai
import psutil
import pytest
from tests.serve.tiny import post, serving, wait_until

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine
from hanlin.serve.run import address_of, bind

LONG = {"prompt": "The quick brown fox", "max_tokens": 4000, "temperature": 1.0, "ignore_eos": True}


@pytest.fixture
def small(folder):
    """Room for two at a time and one in the queue."""
    engine = Engine.from_folder(folder, max_batch=2, max_waiting=1)
    with serving({"tiny": engine}) as address:
        yield engine, address
    engine.close()


def running(engine) -> int:
    stats = engine.stats()
    return stats.running + stats.waiting


def test_many_at_once_get_what_each_would_get_alone(address):
    bodies = [
        {"prompt": text, "max_tokens": 30, "temperature": 0} for text in ("读和写", "The dog", "def add(", "狗", "x")
    ]
    alone = [post(address, "/v1/completions", body).json()["choices"] for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda body: post(address, "/v1/completions", body).json()["choices"], bodies * 2))
    assert answers == alone * 2


def test_models_and_small_routes(client, address, engine):
    [model] = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/version").json()["version"]
    ids = post(address, "/tokenize", {"prompt": "读和写 龘"}).json()
    assert ids["tokens"] == engine.tokenizer.prompt("读和写 龘") and ids["count"] == len(ids["tokens"])
    assert post(address, "/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "读和写 龘"}
    messages = [{"role": "user", "content": "a"}]
    assert post(address, "/tokenize", {"messages": messages}).json()["tokens"] == engine.tokenizer.chat(messages)
    assert post(address, "/tokenize", {}).status_code == 400


def test_the_schema_names_every_route_and_needs_no_other_host(address):
    schema = httpx.get(f"{address}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics"} <= set(schema["paths"])
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "temperature", "min_p"} <= set(body["properties"])
    assert "$ref" not in json.dumps(body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(small, stream):
    engine, address = small
    body = LONG | {"stream": stream, "n": 2}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(30, read=0.5)) as client:
        if stream:
            with client.stream("POST", f"{address}/v1/completions", json=body) as response:
                assert response.status_code == 200
                lines = response.iter_lines()  # kept: when it goes, the connection goes
                next(lines)
                assert running(engine) == 2
                raise httpx.ReadTimeout("enough")
        client.post(f"{address}/v1/completions", json=body)
    wait_until(lambda: running(engine) == 0, seconds=2)
    assert post(address, "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


def test_past_the_queue_is_429_and_a_place_comes_free_again(small):
    engine, address = small
    with concurrent.futures.ThreadPoolExecutor(4) as pool, HeldStreams() as streams:
        for _ in range(3):
            pool.submit(streams.open, address)
        wait_until(lambda: running(engine) == 3)
        response = post(address, "/v1/completions", LONG)
        assert response.status_code == 429 and response.headers["retry-after"]
        assert response.json()["error"]["type"] == "rate_limit_error"
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
        assert running(engine) == 3
        streams.close()
        wait_until(lambda: running(engine) == 0, seconds=5)
        assert post(address, "/v1/completions", LONG | {"max_tokens": 2}).status_code == 200


class HeldStreams:
    """Streams that are held open until told otherwise."""

    def __init__(self):
        self.closing = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def open(self, address):
        with httpx.stream("POST", f"{address}/v1/completions", json=LONG | {"stream": True}, timeout=60) as response:
            for _ in response.iter_lines():
                if self.closing:
                    return

    def close(self):
        self.closing = True


async def restless(number: int, address: str, end: float, counts: Counter) -> None:
    """A client that asks, whole or streamed, and leaves when it likes."""
    dice = random.Random(number)
    async with httpx.AsyncClient(base_url=address, timeout=60, verify=False) as http:
        while time.monotonic() < end:
            prompt = f"{'读和写是一枚硬币的两面。' * dice.randint(0, 4)} {dice.randint(0, 9)} fox"
            body = {"prompt": prompt, "max_tokens": dice.randint(1, 60), "stream": dice.random() < 0.5}
            try:
                async with asyncio.timeout(dice.choice([0.05, 0.3, 2.0, 60.0])):
                    response = await http.post("/v1/completions", json=body)
                assert response.status_code in (200, 429), response.text
                assert response.status_code == 429 or not body["stream"] or "data: [DONE]" in response.text
                counts[response.status_code] += 1
            except TimeoutError:
                counts["left"] += 1


async def crowd(address: str, seconds: float) -> Counter:
    counts: Counter = Counter()
    end = time.monotonic() + seconds
    await asyncio.gather(*(restless(number, address, end, counts) for number in range(200)))
    return counts


@pytest.mark.slow
def test_two_hundred_clients_with_random_aborts_leave_nothing_behind(folder):
    """For a minute. No page, place or byte stays behind: every request is answered, refused or left by its client."""
    limits = ("--max-batch", 16, "--cache-bytes", 4 * 2**20)
    with command(folder, "--port", 0, "--no-page", "--name", "tiny", *limits) as process:
        address = re.search(r"http://\S+", process.stderr.readline())[0]
        asyncio.run(crowd(address, 20))
        server = psutil.Process(process.pid)
        before, files = server.memory_info().rss, server.num_fds()
        counts = asyncio.run(crowd(address, 40))
        assert counts[200] > 200 and counts["left"] > 50, counts
        gauges = [f'vllm:{name}{{model_name="tiny"}}' for name in IDLE]
        wait_until(lambda: all(read_metrics(address)[gauge] == 0 for gauge in gauges))
        assert server.memory_info().rss - before < 16 * 2**20
        wait_until(lambda: server.num_fds() <= files)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and "Traceback" not in rest, rest


IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def read_metrics(address) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics").text
    sample = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\} (\S+)")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        match = sample.fullmatch(line)
        assert match, line
        found[f"{match[1]}{{{match[2]}}}"] = float(match[3])
    declared = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    names = {re.sub(r"_(bucket|sum|count)$", "", key.split("{")[0]) for key in found}
    assert names == declared
    return found


def test_the_metrics_count_what_happened(address, engine):
    model = 'model_name="tiny"'
    before = read_metrics(address)
    prompt = "狗并不在意，读和写。" * 5
    body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "n": 2}
    assert post(address, "/v1/completions", body).status_code == 200
    after = read_metrics(address)

    def grown(name, labels=model):
        return after[f"vllm:{name}{{{labels}}}"] - before[f"vllm:{name}{{{labels}}}"]

    assert grown("prompt_tokens_total") == 2 * len(engine.tokenizer.prompt(prompt))
    assert grown("prefix_cache_queries_total") == grown("prompt_tokens_total") > grown("prefix_cache_hits_total") > 0
    assert grown("generation_tokens_total") == 10
    assert grown("request_success_total", f'{model},finished_reason="length"') == 2
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == 8
    assert grown("e2e_request_latency_seconds_count") == 2
    assert after[f'vllm:e2e_request_latency_seconds_bucket{{{model},le="+Inf"}}'] >= 2
    assert after[f"vllm:num_requests_running{{{model}}}"] == 0
    assert 0 <= after[f"vllm:kv_cache_usage_perc{{{model}}}"] <= 1


def test_a_taken_port_is_named_together_with_a_free_one():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(HanlinError, match=rf"Port {taken} .* --port (\d+)") as error:
            bind("127.0.0.1", taken)
    free = int(re.search(r"--port (\d+)", str(error.value))[1])
    with bind("127.0.0.1", free) as listener:
        assert address_of(listener) == f"http://127.0.0.1:{free}"
    for port in (70_000, -1):
        with pytest.raises(HanlinError, match="between 0 and 65535"):
            bind("127.0.0.1", port)
    with pytest.raises(HanlinError, match="--host"):
        bind("no.such.host.invalid", 0)


def command(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    program = "import sys; from hanlin.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", program, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


def test_the_command_serves_until_it_is_told_to_stop(folder):
    with command(folder, "--port", 0, "--no-page", "--name", "mine", "--api-key", "secret") as process:
        lines = [process.stderr.readline() for _ in range(3)]
        address = re.search(r"http://\S+", lines[0])[0]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            assert [model.id for model in client.models.list()] == ["mine"]
            completion = client.completions.create(model="mine", prompt="狗", max_tokens=3)
        assert completion.usage.completion_tokens <= 3
        assert httpx.get(f"{address}/").status_code == 404
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such/folder",), "no/such/folder is not a folder"),
        ((".", "--api-key", ""), "--api-key is empty"),
        (("a", "b", "--name", "c"), "--name names one model"),
        (("a", "--prot", "1"), "Did you mean `--port`"),
    ],
)
def test_a_wrong_command_is_one_paragraph(arguments, message):
    with command(*arguments) as process:
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert message in error and "Traceback" not in error


def test_a_taken_port_ends_the_command_at_once(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with command(folder, "--port", port, "--no-page") as process:
            error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert f"Port {port}" in error and "--port" in error and "Traceback" not in error
