"""POST /v1/chat/completions as OpenAI's own client sees it."""

import json
import math

import httpx
import pytest
import torch
from tests.serve.tiny import make_parrot, post, serving

from hanlin.engine import Engine, SamplingParams

QUESTION = [{"role": "user", "content": "敏捷的 fox？"}]
GREEDY = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 40}


def ask(client, **changes):
    return client.chat.completions.create(**{**GREEDY, **changes})


def test_an_answer_has_the_parts_that_clients_read(client, engine):
    answer = ask(client)
    assert answer.object == "chat.completion" and answer.model == "tiny" and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    prompt = len(engine.tokenizer.chat(QUESTION))
    assert answer.usage.prompt_tokens == prompt and answer.usage.completion_tokens <= 40
    assert answer.usage.total_tokens == prompt + answer.usage.completion_tokens


def test_the_answer_is_the_engines(client, engine):
    [completion] = engine.generate([QUESTION], SamplingParams(max_tokens=40, temperature=0.0))
    assert ask(client).choices[0].message.content == completion.text


@pytest.mark.parametrize("seed", range(6))
def test_streamed_pieces_join_to_the_whole_and_no_character_is_split(client, seed):
    changes = {"temperature": 1.5, "seed": seed, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
    whole = ask(client, **changes).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **changes)]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 5
    assert whole.encode().decode() == whole


def test_a_chinese_character_of_several_tokens_arrives_whole(tmp_path):
    """A model that learnt one sentence by heart says it; 龘 is not in the vocabulary, only its bytes are."""
    sentence = "翰林院里的龘字很少见，龘龘龘。"
    with Engine.from_folder(make_parrot(tmp_path / "parrot", sentence)) as engine, serving({"p": engine}) as address:
        ids = engine.tokenizer.encode(sentence)
        start = next(n for n in range(1, len(ids)) if sentence.startswith(engine.tokenizer.decode(ids[:n])))
        assert len(engine.tokenizer.encode("龘")) > 1
        body = {"prompt": ids[:start], "max_tokens": 60, "stream": True, "temperature": 0, "logprobs": 0}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
        pieces = [choice["text"] for choice in choices]
        assert engine.tokenizer.decode(ids[:start]) + "".join(pieces) == sentence
        assert pieces.count("龘") + pieces.count("龘。") == 4 and "" in pieces
        assert choices[-1]["finish_reason"] == "stop"


def test_the_chunks_of_a_stream_obey_the_wire_rules(address):
    body = {**GREEDY, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1
    for part in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == part]
        assert own[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] in ("stop", "length")
        assert all(choice["finish_reason"] is None for choice in own[:-1])
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stop_string_ends_the_text_before_it(client):
    whole = ask(client, extra_body={"ignore_eos": True}).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    for stream in (False, True):
        answer = ask(client, stop=[stop, "never, ever"], stream=stream, extra_body={"ignore_eos": True})
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            text, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)]
        assert reason == "stop"


def test_a_stop_token_ends_the_answer(client, engine):
    ids = engine.tokenizer.encode(ask(client).choices[0].message.content)
    answer = ask(client, extra_body={"stop_token_ids": ids[:1]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_bytes_of_the_logprobs_spell_the_text(client, stream, temperature):
    answer = ask(client, logprobs=True, top_logprobs=3, stream=stream, temperature=temperature, seed=1)
    if stream:
        text, tokens = "", []
        for chunk in answer:
            text += chunk.choices[0].delta.content or ""
            tokens += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
            spelt = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
            assert spelt.startswith(text.rstrip("\ufffd"))
    else:
        text, tokens = answer.choices[0].message.content, answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace") == text
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        best = [alternative.logprob for alternative in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        if temperature == 0.0:
            assert math.isclose(best[0], token.logprob, abs_tol=1e-5)


def test_the_logprobs_are_those_of_transformers(client, engine, folder):
    from transformers import AutoModelForCausalLM

    answer = ask(client, logprobs=True, temperature=1.2, seed=3, extra_body={"ignore_eos": True})
    ids = engine.tokenizer.chat(QUESTION)
    rows = answer.choices[0].logprobs.content
    text_ids, given = [], []
    spelling = {engine.tokenizer.token_bytes(i): i for i in range(engine.tokenizer.size)}
    for row in rows:
        text_ids.append(spelling[bytes(row.bytes)])
        given.append(row.logprob)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids + text_ids])).logits[0].log_softmax(-1)
    first = len(ids) - 1
    expected = [float(logits[first + i, token]) for i, token in enumerate(text_ids)]
    if any(i in engine.tokenizer.stop_ids for i in text_ids) or answer.usage.completion_tokens != len(text_ids):
        pytest.skip("an end token without text lies between")
    assert max(abs(a - b) for a, b in zip(given, expected, strict=True)) < 1e-3


def test_n_answers_differ_and_a_seed_repeats_them(client):
    def texts(seed):
        answer = ask(client, n=3, temperature=1.5, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = texts(7)
    assert len(set(first)) == 3
    assert texts(7) == first
    assert texts(8) != first


def test_the_sampling_parameters_act(client):
    free = {"temperature": 3.0, "seed": 5}
    greedy = ask(client).choices[0].message.content
    assert ask(client, **free).choices[0].message.content != greedy
    for taming in ({"top_k": 1}, {"min_p": 1.0}):
        assert ask(client, **free, extra_body=taming).choices[0].message.content == greedy
    assert ask(client, **free, top_p=1e-6).choices[0].message.content == greedy
    punished = ask(client, extra_body={"repetition_penalty": 50.0, "ignore_eos": True}).choices[0].message.content
    assert punished != ask(client, extra_body={"ignore_eos": True}).choices[0].message.content


def test_length_limits_act(client):
    answer = ask(client, max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"
    answer = ask(client, max_tokens=None, max_completion_tokens=4, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 4


def test_content_may_come_in_text_parts_and_a_developer_is_the_system(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    joined = [{"role": "user", "content": "one\ntwo"}]
    first, second = (ask(client, messages=messages) for messages in (parts, joined))
    assert first.choices[0].message.content == second.choices[0].message.content
    developer = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    first, second = (ask(client, messages=messages) for messages in (developer, system))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


def test_what_changes_nothing_is_accepted(address):
    labels = {"user": "u", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": None, "logit_bias": {}}
    labels |= {"response_format": {"type": "text"}, "presence_penalty": 0, "frequency_penalty": 0.0}
    plain, labelled = (post(address, "/v1/chat/completions", GREEDY | more).json() for more in ({}, labels))
    assert plain["choices"] == labelled["choices"]


def test_the_clients_own_streaming_helper_agrees(client):
    stop = ask(client).choices[0].message.content[-2:]
    with client.chat.completions.stream(**GREEDY, stop=stop) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ask(client, stop=stop).choices[0].message.content
