"""Every mistake of a client has its status and a message in OpenAI's form."""

import time

import httpx
import openai
import pytest
from tests.serve.tiny import post, serving

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
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
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": 1}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"model": None}, "model"),
        ({"tools": "f"}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": "required", "tools": [TOOL], "guided_regex": "a"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        ({"guided_choice": []}, "guided_choice"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"num_beam_groups": 2}, "num_beam_groups"),
        ({"use_beam_search": True, "n": 3, "num_beam_groups": 2}, "beam_groups"),
        ({"penalty_alpha": 0.5}, "top_k"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"typical_p": 0}, "typical_p"),
        ({"dry_sequence_breakers": ["a"]}, "dry_sequence_breakers"),
        ({"bad_words": [""]}, "bad_words"),
        ({"prompt_logprobs": 50}, "prompt_logprobs"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"priority": "high"}, "priority"),
        ({"echo": True}, "echo"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
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
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"grammar": "root ::= a"},
        {"chat_template": "{{ messages }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"store": True},
        {"reasoning_effort": "high"},
        {"verbosity": "low"},
        {"prediction": {"type": "content", "content": "a"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "a"}},
        {"web_search_options": {}},
        {"service_tier": "flex"},
        {"thinking_token_budget": 5},
        {"mirostat": 2},
        {"dry_penalty_last_n": 64},
        {"truncate_prompt_tokens": 5},
        {"allowed_token_ids": [1]},
        {"documents": [{"text": "a"}]},
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


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "bomb",
    [
        {"guided_json": nested(300)},
        {"guided_json": {"$ref": "#"}},
        {"guided_json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
        {"guided_json": {"type": "object", "properties": {f"p{n}": {"enum": list(range(50))} for n in range(500)}}},
        {"guided_regex": "(a{1,1000}){1,1000}b"},
        {"guided_regex": "(" * 5000},
        {"guided_regex": "a" * 200_000},
        {"guided_grammar": "start: start"},
        {"guided_grammar": "start: " + " ".join(['"a"'] * 20_000)},
        {"guided_choice": ["狗" * 1000] * 4000},
        {"stop": ["a" * 10_000]},
        {"logit_bias": {str(n): 1 for n in range(100_000)}},
        {"n": 1000},
        {"chat_template_kwargs": {"a": nested(400)}},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": nested(300)}}],
            "tool_choice": "required",
        },
    ],
    ids=lambda bomb: next(iter(bomb)),
)
def test_bombs_are_answered_soon_and_hurt_nobody(address, bomb):
    began = time.monotonic()
    response = post(address, "/v1/chat/completions", CHAT | bomb)
    assert response.status_code in (200, 400), response.text
    assert time.monotonic() - began < 30
    assert post(address, "/v1/chat/completions", CHAT).status_code == 200


def test_ten_megabytes_of_text_are_too_long_not_too_much(address):
    body = TEXT | {"prompt": "敏捷的 fox " * 700_000}
    response = post(address, "/v1/completions", body)
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"


def test_too_large_a_body_is_413(address):
    response = httpx.post(f"{address}/v1/completions", content=b" " * (17 * 2**20), timeout=60)
    assert response.status_code == 413
    error_of(response)


def test_wrong_addresses_and_methods_are_answered_in_the_same_form(address):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/images", 404),
        ("GET", "/v1/embeddings", 405),
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
            ("POST", "/v1/embeddings", {"input": "a"}),
            ("POST", "/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 2}),
            ("POST", "/v1/messages", CHAT),
            ("POST", "/v1/messages/count_tokens", {"model": "tiny", "messages": CHAT["messages"]}),
            ("POST", "/rerank", {"query": "a", "documents": ["b"]}),
            ("POST", "/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("POST", "/score", {"text_1": "a", "text_2": "b"}),
        ]
        right = {"Authorization": b"Bearer " + key.encode()}
        wrong = [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic c2VzYW1l"}]
        for method, path, body in routes:
            for headers in wrong:
                response = httpx.request(method, address + path, json=body, headers=headers)
                assert response.status_code == 401, (path, headers)
                assert response.json()["error"]["type"] == "authentication_error"
            assert httpx.request(method, address + path, json=body, headers=right, timeout=60).status_code == 200, path
            other = {"x-api-key": right["Authorization"].removeprefix(b"Bearer ")}  # as Anthropic's client does
            assert httpx.request(method, address + path, json=body, headers=other, timeout=60).status_code == 200, path
        for method, path in (
            ("GET", "/v1/responses/x"),
            ("DELETE", "/v1/responses/x"),
            ("POST", "/v1/responses/x/cancel"),
            ("GET", "/v1/responses/x/input_items"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
        ):
            assert httpx.request(method, address + path, json={}).status_code == 401, path
        for path in ("/health", "/metrics", "/version"):
            assert httpx.get(address + path).status_code == 200
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="nope", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
