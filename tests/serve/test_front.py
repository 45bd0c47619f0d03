"""One address before two replicas: prompts meet their pages again, what is lost is asked again or ends with an error.

The replicas are real applications in this process; what is put on is how they die.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator

import httpx
import pytest
import uvicorn
from tests.serve.tiny import post, wait_until

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine
from hanlin.serve.affinity import home_of
from hanlin.serve.app import create_app
from hanlin.serve.fleet import Ask, Fleet, ReplicaLostError, Whole, answer_of, whole_answer_of
from hanlin.serve.front import create_front, merge_metrics
from hanlin.serve.limits import Key
from hanlin.serve.replicas import Offer
from hanlin.serve.run import address_of, bind

LONG = {"prompt": "敏捷的棕色狐狸", "max_tokens": 3000, "ignore_eos": True, "temperature": 1.0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "狗 and dog"}], "max_tokens": 8}


class Here(Fleet):
    """Two replicas; the next `deaths` answers are lost after as many messages."""

    def __init__(self, engines, **options):
        self.engines = engines
        self.apps = {name: create_app({"tiny": engine}, **options) for name, engine in engines.items()}
        self.deaths: list[int] = []
        self.asked: list[str] = []

    async def ask(self, ask: Ask) -> AsyncGenerator:
        if not self.apps:
            raise ReplicaLostError
        name = ask.replica or home_of(ask.key or b"", dict.fromkeys(self.apps, 0))
        self.asked.append(name)
        left = self.deaths.pop(0) if self.deaths else -1
        async with contextlib.aclosing(answer_of(self.apps[name], ask)) as messages:
            if left == 0:
                raise ReplicaLostError
            async for message in messages:
                yield message
                left -= 1
                if left == 0:
                    raise ReplicaLostError

    async def ask_all(self, ask: Ask) -> dict[str, Whole]:
        return {name: await whole_answer_of(app, ask, i) for i, (name, app) in enumerate(self.apps.items())}


@contextlib.contextmanager
def standing(app):
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


@pytest.fixture(scope="module")
def engines(folder):
    engines = {name: Engine.from_folder(folder, device="cpu") for name in ("a", "b")}
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture
def front(engines):
    fleet = Here(engines)
    with standing(create_front(fleet)) as address:
        yield fleet, address
    wait_until(lambda: not any(e.stats().running + e.stats().waiting for e in engines.values()), seconds=5)


def test_an_answer_is_what_the_replica_would_have_said(front, address):
    _, before = front
    for path, body in (
        ("/v1/completions", {"prompt": "读和写", "max_tokens": 9, "temperature": 0}),
        ("/tokenize", {"prompt": "读和写 reading"}),
        ("/v1/completions", {"prompt": 3.5}),
        ("/v1/chat/completions", CHAT | {"temperature": 0}),
        ("/v1/nothing", {}),
    ):
        ours, alone = post(before, path, body), post(address, path, body)
        assert ours.status_code == alone.status_code
        keep = [{k: v for k, v in one.json().items() if k not in ("id", "created", "usage")} for one in (ours, alone)]
        assert keep[0] == keep[1]
    assert httpx.get(f"{before}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.post(f"{before}/v1/completions", content=b"{no json").status_code == 400
    assert httpx.get(f"{before}/v1/completions").status_code == 405
    assert "/v1/messages" in httpx.get(f"{before}/openapi.json").json()["paths"]
    assert httpx.get(f"{before}/version").json()["version"]
    assert post(before, "/v1/completions", {"prompt": "x" * (17 * 2**20)}).status_code == 413


def test_prompts_that_begin_alike_find_their_pages(front):
    _, address = front
    hits = []
    for group in range(6):
        beginning = f"第{group}卷 " + "读和写是一枚硬币的两面。" * 100
        for question in "abcd":
            answer = post(address, "/v1/completions", {"prompt": beginning + question, "max_tokens": 1}).json()
            hits.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 500)
    assert hits == [False, True, True, True] * 6


def test_a_request_whose_replica_dies_is_asked_again_once(front):
    fleet, address = front
    fleet.deaths = [0]
    assert post(address, "/v1/chat/completions", CHAT).status_code == 200
    assert len(fleet.asked) == 2
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/messages", CHAT)):
        fleet.deaths = [0, 0]
        answer = post(address, path, body)
        assert answer.status_code == 503 and "lost" in answer.json()["error"]["message"]
        assert ("type" in answer.json()) == (path == "/v1/messages")
        assert answer.headers["retry-after"]
    assert not fleet.deaths and len(fleet.asked) == 6


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"max_tokens": 500, "ignore_eos": True}),
        ("/v1/completions", LONG),
        ("/v1/responses", {"model": "tiny", "input": "读", "max_output_tokens": 500}),
        ("/v1/messages", CHAT | {"max_tokens": 500}),
    ],
)
def test_a_stream_whose_replica_dies_ends_with_an_error(front, path, body):
    fleet, address = front
    fleet.deaths = [2]
    answer = post(address, path, body | {"stream": True})
    assert answer.status_code == 200 and len(fleet.asked) == 1
    last = json.loads([line for line in answer.text.splitlines() if line][-1].removeprefix("data: "))
    assert last.get("type", "error") == "error" and "lost" in json.dumps(last)


def test_what_waits_is_sent_together():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"b", b"c"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0.05)
        await send({"type": "http.response.body", "body": b"d"})

    async def collect():
        return [message async for message in answer_of(app, Ask({"type": "http"}))]

    start, first, last = asyncio.run(collect())
    assert start["status"] == 200
    assert (first["body"], first["more_body"]) == (b"abc", True)
    assert (last["body"], last.get("more_body", False)) == (b"d", False)


def test_another_answer_whose_replica_dies_is_cut_off(front):
    fleet, address = front
    fleet.deaths = [1]
    with pytest.raises(httpx.RemoteProtocolError):
        post(address, "/v1/chat/completions", CHAT)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(front, stream):
    fleet, address = front
    engine = fleet.engines
    body, patience = LONG | {"stream": stream}, httpx.Timeout(30, read=1.0)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=patience) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        assert sum(one.stats().running for one in engine.values()) == 1
    wait_until(lambda: sum(one.stats().running for one in engine.values()) == 0, seconds=2)


def test_a_kept_answer_is_found_where_it_is(front):
    fleet, address = front
    ids = []
    for number in range(8):
        first = post(
            address, "/v1/responses", {"model": "tiny", "input": f"{number} 号", "max_output_tokens": 16}
        ).json()
        keeper = fleet.asked[-1]
        more = {"model": "tiny", "input": "再来", "previous_response_id": first["id"], "max_output_tokens": 16}
        assert post(address, "/v1/responses", more).status_code == 200
        assert fleet.asked[-1] == keeper
        assert httpx.get(f"{address}/v1/responses/{first['id']}").json()["id"] == first["id"]
        ids.append((first["id"], keeper))
    assert {keeper for _, keeper in ids} == {"a", "b"}
    for one, _ in ids:
        assert httpx.delete(f"{address}/v1/responses/{one}").json()["deleted"]
        assert httpx.get(f"{address}/v1/responses/{one}").status_code == 404
    assert post(address, "/v1/responses", more).status_code == 404
    assert post(address, "/v1/responses", more | {"previous_response_id": "../x"}).status_code == 404


def test_the_metrics_are_of_all_replicas(front):
    _, address = front
    text = httpx.get(f"{address}/metrics").text
    lines = text.splitlines()
    types = [line for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types)) > 5
    for number in "01":
        assert sum(f'replica="{number}",model_name="tiny"' in line for line in lines) > 20


def test_merged_samples_stand_below_their_family():
    first = '# HELP a A.\n# TYPE a counter\na{x="1"} 1\n# HELP b B.\n# TYPE b gauge\nb 2\n'
    texts = {"0": first, "1": "# HELP b B.\n# TYPE b gauge\nb{} 3\n"}
    assert merge_metrics(texts) == (
        '# HELP a A.\n# TYPE a counter\na{replica="0",x="1"} 1\n'
        '# HELP b B.\n# TYPE b gauge\nb{replica="0"} 2\nb{replica="1"} 3\n'
    )


def test_health_is_of_any_replica(front):
    fleet, address = front
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "replicas": 2}
    del fleet.apps["b"]
    assert httpx.get(f"{address}/ping").json() == {"status": "ok", "replicas": 1}
    fleet.apps.clear()
    for path in ("/health", "/v1/responses/x", "/v1/models"):
        answer = httpx.get(address + path)
        assert answer.status_code == 503 and answer.json()["error"]["code"] in ("no_replica", "replica_lost")


def test_keys_are_asked_for_and_counted_once(engines):
    keys = [Key("one", "alice", max_concurrent=1)]
    fleet = Here(engines, api_key="secret", keys=[Key("one", "alice")])
    with standing(create_front(fleet, api_key="secret", keys=keys)) as address:
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/health").status_code == httpx.get(f"{address}/metrics").status_code == 200
        mine = {"headers": {"Authorization": "Bearer one"}}
        other = {"headers": {"x-api-key": "secret"}}
        url, short = f"{address}/v1/completions", {"prompt": "狗", "max_tokens": 1}
        with httpx.stream("POST", url, json=LONG | {"stream": True}, timeout=60, **mine) as held:
            lines = held.iter_lines()
            next(lines)
            assert httpx.post(url, json=short, **mine).status_code == 429
            assert httpx.get(f"{address}/v1/models", **mine).status_code == 200
            assert httpx.post(url, json=short, **other).status_code == 200
        wait_until(lambda: httpx.post(url, json=short, **mine).status_code == 200)


def test_what_replicas_cannot_do_together_is_refused(front):
    _, address = front
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = post(address, path, {"lora_name": "x", "lora_path": "y"})
        assert answer.status_code == 403 and "--adapter" in answer.json()["error"]["message"]
    with pytest.raises(HanlinError, match="tokens_per_minute"):
        Offer({"tiny": "x"}, keys=[Key("k", "alice", tokens_per_minute=5)])
