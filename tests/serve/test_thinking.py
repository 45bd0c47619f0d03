"""Reasoning on the wire: apart from the answer in every interface, and switched by the request."""

import pytest
from tests.serve.tiny import make_actor, post, serving

from hanlin.engine import Engine

MARKS = {"<|reserved_0|>": "<think>", "<|reserved_1|>": "</think>"}
TEMPLATE = """{%- for m in messages %}<|im_start|>{{ m.role }}
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content }}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
QUESTION = [{"role": "user", "content": "fox？"}]
ASK = {"model": "thinker", "messages": QUESTION, "temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    scenes = [(QUESTION, [], "<think>想 first</think>敏捷的 fox")]
    folder = make_actor(tmp_path_factory.mktemp("thinker") / "t", scenes, template=TEMPLATE, spellings=MARKS)
    with Engine.from_folder(folder) as engine, serving({"thinker": engine}) as address:
        yield address, engine.tokenizer


def test_reasoning_stands_beside_the_content(thinker):
    address, tokenizer = thinker
    answer = post(address, "/v1/chat/completions", ASK).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "敏捷的 fox" and message["reasoning_content"] == "想 first"
    expected = len(tokenizer.encode("<think>想 first</think>", special=True))
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == expected
    hidden = post(address, "/v1/chat/completions", ASK | {"include_reasoning": False}).json()["choices"][0]["message"]
    assert hidden["content"] == "敏捷的 fox" and "reasoning_content" not in hidden


def test_streamed_reasoning_is_the_same(thinker, client):
    address, _ = thinker
    with client.with_options(base_url=f"{address}/v1").chat.completions.stream(**ASK) as stream:
        deltas = [event.chunk.choices[0].delta for event in stream if event.type == "chunk"]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == "想 first" and "".join(delta.content or "" for delta in deltas) == "敏捷的 fox"


def test_every_interface_tells_reasoning_apart(thinker):
    address, _ = thinker
    body = {"model": "thinker", "input": "fox？", "temperature": 0}
    items = post(address, "/v1/responses", body).json()["output"]
    assert [item["type"] for item in items] == ["reasoning", "message"]
    assert items[0]["content"][0]["text"] == "想 first" and items[1]["content"][0]["text"] == "敏捷的 fox"
    text = post(address, "/v1/responses", body | {"stream": True}).text
    assert "event: response.reasoning_text.delta" in text and "event: response.reasoning_text.done" in text
    again = [{"role": "user", "content": "fox？"}, *items, {"role": "user", "content": "a"}]
    assert post(address, "/v1/responses", body | {"input": again, "max_output_tokens": 2}).status_code == 200
    blocks = post(address, "/v1/messages", ASK).json()["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"] and blocks[0]["thinking"] == "想 first"
    assert '"thinking_delta"' in post(address, "/v1/messages", ASK | {"stream": True}).text


def test_the_request_switches_reasoning(thinker):
    address, tokenizer = thinker
    plain = tokenizer.chat(QUESTION)
    without = tokenizer.chat(QUESTION, enable_thinking=False)
    assert plain != without

    def prompt(**changes):
        answer = post(address, "/v1/chat/completions", ASK | {"return_token_ids": True, "max_tokens": 30} | changes)
        assert answer.status_code == 200, answer.text
        return answer.json()["prompt_token_ids"]

    assert prompt() == prompt(reasoning_effort="high") == plain
    assert prompt(reasoning_effort="none") == prompt(chat_template_kwargs={"enable_thinking": False}) == without
    assert prompt(guided_choice=["fox"]) == without  # a prescribed form leaves no room
    unknown = post(address, "/v1/chat/completions", ASK | {"chat_template_kwargs": {"enable_dreaming": True}})
    assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "chat_template_kwargs"
    counted = {"model": "thinker", "messages": QUESTION, "thinking": {"type": "disabled"}}
    assert post(address, "/v1/messages/count_tokens", counted).json()["input_tokens"] == len(without)


def test_a_form_is_kept_whatever_the_model_would_think(thinker):
    address, _ = thinker
    body = ASK | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["fox"]}}}}
    message = post(address, "/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] == '"fox"' and "reasoning_content" not in message
