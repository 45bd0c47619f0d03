"""Whatever a client sends, the server answers with success or a mistake of the client's: never 5xx, always JSON."""

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanlin.serve.adapters import LoadAdapterRequest, UnloadAdapterRequest
from hanlin.serve.anthropic_request import CountRequest, MessagesRequest
from hanlin.serve.chat_request import ChatRequest
from hanlin.serve.completion_request import CompletionRequest
from hanlin.serve.embeddings import EmbeddingRequest
from hanlin.serve.refusals import HARMLESS, REFUSED
from hanlin.serve.rerank import RerankRequest, ScoreRequest
from hanlin.serve.responses_request import ResponsesRequest
from hanlin.serve.small import DetokenizeRequest, TokenizeRequest

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user"] * 4 + ["assistant", "system", "developer", "tool"]),
        "content": st.text(max_size=20) | st.text(max_size=20) | st.text(max_size=20) | anything,
    }
)
likely = {  # values that get past the first check often enough to reach the engine
    "model": st.sampled_from(["tiny", "other"]),
    "messages": st.lists(message, min_size=1, max_size=2) | st.lists(message, max_size=3),
    "prompt": st.text(max_size=20)
    | st.lists(st.integers(-1, 500), max_size=5)
    | st.lists(st.text(max_size=5), max_size=3),
    "tokens": st.lists(st.integers(-1, 500), max_size=5),
    "max_tokens": st.integers(0, 6),
    "max_completion_tokens": st.integers(0, 6),
    "min_tokens": st.integers(0, 8),
    "n": st.integers(0, 3),
    "stream": st.booleans(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-2, 10),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 5),
    "echo": st.booleans(),
    "seed": st.integers(),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(-1, 500), max_size=3),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "input": st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=3) | st.lists(message, max_size=2),
    "query": st.text(max_size=5),
    "documents": st.lists(st.text(max_size=5), max_size=3),
    "text_1": st.text(max_size=5),
    "text_2": st.lists(st.text(max_size=5), max_size=3),
    "lora_name": st.text(max_size=5),
    "lora_path": st.sampled_from(["..", "/", "a", "\0"]),
    "max_output_tokens": st.integers(0, 6),
    "top_n": st.integers(0, 3),
    "dimensions": st.integers(0, 40),
    "logit_bias": st.dictionaries(st.integers(-1, 500).map(str), st.floats(-110, 110), max_size=3),
    "presence_penalty": st.floats(-2.1, 2.1),
    "frequency_penalty": st.floats(-2.1, 2.1),
    "typical_p": st.floats(0, 1),
    "best_of": st.integers(0, 3),
    "prompt_logprobs": st.integers(0, 3),
    "bad_words": st.lists(st.text(max_size=3), max_size=2),
    "guided_choice": st.lists(st.text(max_size=3), max_size=2),
    "guided_regex": st.sampled_from(["a*", "(", "[a-c]{1,3}", ""]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "x"}]),
    "return_token_ids": st.booleans(),
    "cache_salt": st.text(max_size=3),
    "priority": st.integers(-3, 3),
    "dry_multiplier": st.floats(0, 2),
    "no_repeat_ngram_size": st.integers(0, 4),
    "use_beam_search": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "store": st.booleans(),
    "system": st.text(max_size=5),
    "stop_sequences": st.lists(st.text(max_size=3), max_size=2),
    "instructions": st.text(max_size=5),
    "request_id": st.text(max_size=5),
}
ENDS = ("data: [DONE]", '"message_stop"', '"response.completed"', '"response.incomplete"', '"error"')
ROUTES = {
    "/v1/chat/completions": (ChatRequest, ("model", "messages")),
    "/v1/completions": (CompletionRequest, ("prompt",)),
    "/tokenize": (TokenizeRequest, ()),
    "/detokenize": (DetokenizeRequest, ("tokens",)),
    "/v1/embeddings": (EmbeddingRequest, ("input",)),
    "/v1/responses": (ResponsesRequest, ("model", "input")),
    "/v1/messages": (MessagesRequest, ("model", "messages")),
    "/v1/messages/count_tokens": (CountRequest, ("model", "messages")),
    "/rerank": (RerankRequest, ("query", "documents")),
    "/score": (ScoreRequest, ("text_1", "text_2")),
    "/v1/load_lora_adapter": (LoadAdapterRequest, ("lora_name", "lora_path")),
    "/v1/unload_lora_adapter": (UnloadAdapterRequest, ("lora_name",)),
}


@st.composite
def bodies(draw):
    path = draw(st.sampled_from(sorted(ROUTES)))
    kind, required = ROUTES[path]
    names = draw(st.lists(st.sampled_from(sorted(kind.model_fields)), max_size=5, unique=True))
    wild = draw(st.lists(st.sampled_from(sorted({*REFUSED, *HARMLESS, "nonsense", *kind.model_fields})), max_size=2))
    body = {name: draw(likely.get(name, anything)) for name in sorted({*names, *required})}
    if "max_tokens" in kind.model_fields:
        body.setdefault("max_tokens", 3)
    if "max_output_tokens" in kind.model_fields:
        body.setdefault("max_output_tokens", 3)
    if draw(st.booleans()):
        body |= {name: draw(anything) for name in wild}
    return path, body


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(request=bodies())
def test_no_body_is_answered_with_a_server_error(address, request):
    path, body = request
    response = httpx.post(address + path, json=body, timeout=60)
    assert response.status_code in (200, 400, 403, 404, 413), (body, response.text)
    if response.headers["content-type"].startswith("text/event-stream"):
        assert any(end in response.text.splitlines()[-2] for end in ENDS), (body, response.text)
    elif response.status_code != 200:
        assert {"message", "type"} <= set(response.json()["error"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(ROUTES)), raw=st.binary(max_size=60) | anything.map(repr).map(str.encode))
def test_no_bytes_are_answered_with_a_server_error(address, path, raw):
    response = httpx.post(address + path, content=raw, timeout=60)
    assert response.status_code == 400, raw
    assert response.json()["error"]["message"]
