"""POST /v1/responses as OpenAI's own client sees it: items, typed events, what is remembered."""

import json
import threading

import httpx
import openai
import pytest
from pydantic import BaseModel
from tests.serve.tiny import post, serving, wait_until

from hanlin.serve.limits import Key
from hanlin.serve.store import Kept, ResponseStore

ASK = {"model": "tiny", "input": "读和写 fox", "temperature": 0, "max_output_tokens": 12}
TOOL = {
    "type": "function",
    "name": "pick",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["北京", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ENDLESS = {"extra_body": {"ignore_eos": True}}


def respond(client, **changes):
    return client.responses.create(**{**ASK, **changes})


def events_of(address, body) -> list[dict]:
    text = post(address, "/v1/responses", body | {"stream": True}).text
    lines = text.splitlines()
    named = [line[7:] for line in lines if line.startswith("event: ")]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert named == [event["type"] for event in events]
    return events


def test_a_response_is_the_chat_answer(client, engine):
    response = respond(client, **ENDLESS)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": ASK["input"]}], temperature=0, max_tokens=12, **ENDLESS
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.input_tokens == chat.usage.prompt_tokens and response.usage.output_tokens == 12
    [item] = response.output
    assert item.type == "message" and item.status == "incomplete"


def test_instructions_are_the_system_message(client, engine):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK["input"]}]
    response = respond(client, instructions="Be brief.")
    assert response.usage.input_tokens == len(engine.tokenizer.chat(turns))
    assert response.instructions == "Be brief."
    developer = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": ASK["input"]}]
    assert respond(client, input=developer).output_text == response.output_text


def test_streamed_events_tell_the_same_story(client, address):
    whole = respond(client)
    events = events_of(address, ASK)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    pieces = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text and len(pieces) > 3
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == whole.output_text
    assert final["usage"]["output_tokens"] == whole.usage.output_tokens
    stop = whole.output_text[-3:]  # the client's helper knows only answers that end by themselves
    with client.responses.stream(**ASK, extra_body={"stop": stop}) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == whole.output_text[: whole.output_text.index(stop)] and final.status == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_function_is_an_item(client, address, stream):
    body = ASK | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    if stream:
        events = events_of(address, body)
        pieces = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
        done = next(e for e in events if e["type"] == "response.function_call_arguments.done")
        assert "".join(pieces) == done["arguments"]
        items = events[-1]["response"]["output"]
    else:
        items = post(address, "/v1/responses", body).json()["output"]
    [item] = [item for item in items if item["type"] == "function_call"]
    assert item["name"] == "pick" and json.loads(item["arguments"])["city"] in ("北京", "Paris")
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "晴"}
    conversation = [{"role": "user", "content": ASK["input"]}, item, result]
    assert respond(client, input=conversation, tools=[TOOL]).output
    named = {"type": "function", "name": "pick"}
    chosen = respond(client, **{**body, "tool_choice": named})
    assert [item.type for item in chosen.output if item.type == "function_call"]


def test_the_text_may_have_a_form(client):
    class Answer(BaseModel):
        yes: bool

    response = client.responses.parse(**{**ASK, "max_output_tokens": 60}, text_format=Answer)
    assert isinstance(response.output_parsed, Answer)
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"enum": [1, 2]}}}
    assert json.loads(respond(client, text=form).output_text) in (1, 2)


def test_the_text_comes_with_its_logprobs(client):
    response = respond(client, include=["message.output_text.logprobs"], top_logprobs=2)
    part = response.output[0].content[0]
    assert b"".join(bytes(token.bytes) for token in part.logprobs).decode("utf-8", "replace") == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


def test_a_response_is_kept_and_continued(client, engine):
    first = respond(client, instructions="Only this once.")
    assert client.responses.retrieve(first.id) == first
    second = respond(client, input="又 dog", previous_response_id=first.id)
    turns = [
        {"role": "user", "content": ASK["input"]},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "又 dog"},
    ]
    assert second.usage.input_tokens == len(engine.tokenizer.chat(turns))
    items = client.responses.input_items.list(second.id).data
    assert [item.content[0].text if isinstance(item.content, list) else item.content for item in items] == ["又 dog"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        respond(client, previous_response_id=first.id)
    unkept = respond(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_a_stream_can_be_cancelled_from_elsewhere(address, engine):
    body = ASK | {"stream": True, "ignore_eos": True, "max_output_tokens": 4000}
    found, lines = [], []

    def listen():
        with httpx.stream("POST", f"{address}/v1/responses", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    lines.append(json.loads(line[6:]))
                    found.append(lines[0].get("response", {}).get("id"))

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: len(lines) > 6)
    answer = httpx.post(f"{address}/v1/responses/{found[0]}/cancel", timeout=30)
    assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
    listener.join(timeout=30)
    assert lines[-1]["type"] == "response.incomplete" and lines[-1]["response"]["status"] == "cancelled"
    assert lines[-1]["response"]["usage"]["output_tokens"] < 4000
    assert httpx.get(f"{address}/v1/responses/{found[0]}").json()["status"] == "cancelled"
    wait_until(lambda: engine.stats().running == 0)


def test_nobody_reads_anothers_responses(engine):
    with serving({"tiny": engine}, keys=[Key("a", "alice"), Key("b", "bob")]) as address:
        first = {"Authorization": "Bearer a"}
        kept = post(address, "/v1/responses", ASK, headers=first).json()
        path = f"{address}/v1/responses/{kept['id']}"
        assert httpx.get(path, headers=first).status_code == 200
        assert httpx.get(path, headers={"Authorization": "Bearer b"}).status_code == 404


def test_the_store_is_bounded_and_forgets_the_oldest():
    store = ResponseStore(2)
    for name in "abc":
        store.put(Kept("me", {"id": name}, []))
    assert len(store) == 2
    with pytest.raises(Exception, match="'a'"):
        store.get("a", "me")
    assert store.get("c", "me").response["id"] == "c"
    with pytest.raises(Exception, match="'c'"):
        store.get("c", "another")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "wizard", "content": "a"}]}, "input[0].role"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"model": None}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"n": 2}, "n"),
    ],
    ids=str,
)
def test_what_does_not_act_is_refused_by_name(address, change, param):
    response = post(address, "/v1/responses", ASK | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
