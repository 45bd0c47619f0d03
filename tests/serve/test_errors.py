"""Every mistake of a client has its status and a message in OpenAI's form."""

import httpx
import openai
import pytest
from tests.serve.tiny import post, serving

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "a b", "max_tokens": 2}


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"]
    return error


def test_an_unknown_model_is_404_and_the_known_are_named(client, address):
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.chat.completions.create(model="gpt-9", messages=CHAT["messages"])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    assert error_of(post(address, "/v1/completions", TEXT | {"model": "x"}))["code"] == "model_not_found"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1, 2]", b"null", b'"text"', b"\xff\xfe", b'{"a": NaN}', b"[" * 200_000, b'{"prompt": "\\ud800"}'],
    ids=["empty", "torn", "list", "null", "string", "not UTF-8", "NaN", "deep", "half a pair"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_a_body_that_is_no_json_object_is_400(address, path, raw):
    response = httpx.post(address + path, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usagee": True}}, "stream_options.include_usagee"),
    ],
)
def test_a_wrong_value_names_its_parameter(address, change, param):
    response = post(address, "/v1/chat/completions", CHAT | change)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
        {"logit_bias": {"1": 5}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"store": True},
        {"reasoning_effort": "high"},
        {"best_of": 3},
        {"modalities": ["text", "audio"]},
        {"prompt_logprobs": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_cannot_act_is_refused_by_name(address, change):
    response = post(address, "/v1/chat/completions", CHAT | change)
    error = error_of(response)
    assert response.status_code == 400
    assert error["code"] == "unsupported_parameter" and error["param"] == next(iter(change))


def test_an_unknown_parameter_names_its_neighbour(address):
    response = post(address, "/v1/chat/completions", CHAT | {"temprature": 1})
    error = error_of(response)
    assert response.status_code == 400 and error["code"] == "unknown_parameter"
    assert "'temprature'" in error["message"] and "'temperature'" in error["message"]


@pytest.mark.parametrize(
    "prompt", [[], [[]], [""], "", ["a", 1], [1.5], [[1], "a"], [True], [10**9], [-1], {"a": 1}, None, 7]
)
def test_a_prompt_of_no_known_form_is_refused(address, prompt):
    response = post(address, "/v1/completions", TEXT | {"prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


def test_too_long_a_prompt_is_400_with_the_figures(address, engine):
    long = "fox " * engine.max_context
    for path, body in (
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": long}]}),
        ("/v1/completions", TEXT | {"prompt": long}),
        ("/v1/completions", TEXT | {"prompt": ["short", long]}),
        ("/v1/chat/completions", CHAT | {"max_tokens": engine.max_context}),
    ):
        response = post(address, path, body)
        error = error_of(response)
        assert response.status_code == 400 and error["code"] == "context_length_exceeded"
        assert str(engine.max_context) in error["message"]


def test_too_large_a_body_is_413(address):
    response = httpx.post(f"{address}/v1/completions", content=b" " * (17 * 2**20), timeout=60)
    assert response.status_code == 413
    error_of(response)


def test_wrong_addresses_and_methods_are_answered_in_the_same_form(address):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/docs", 404),
    ):
        response = httpx.request(method, address + path)
        assert response.status_code == status, (method, path)
        error_of(response)


def test_every_inference_route_asks_for_the_key(engine):
    with serving({"tiny": engine}, api_key="开门 sesame") as address:
        key = "开门 sesame"
        routes = [
            ("GET", "/v1/models", None),
            ("GET", "/v1/models/tiny", None),
            ("POST", "/v1/chat/completions", CHAT),
            ("POST", "/v1/completions", TEXT),
            ("POST", "/tokenize", {"prompt": "a"}),
            ("POST", "/detokenize", {"tokens": [300]}),
        ]
        right = {"Authorization": b"Bearer " + key.encode()}
        wrong = [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic c2VzYW1l"}]
        for method, path, body in routes:
            for headers in wrong:
                response = httpx.request(method, address + path, json=body, headers=headers)
                assert response.status_code == 401, (path, headers)
                assert error_of(response)["type"] == "authentication_error"
            assert httpx.request(method, address + path, json=body, headers=right, timeout=60).status_code == 200, path
        for path in ("/health", "/metrics", "/version"):
            assert httpx.get(address + path).status_code == 200
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="nope", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
