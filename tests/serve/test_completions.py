"""POST /v1/completions: prompts as text and as ids, echo, and the log-probabilities that evaluation tools read."""

import math

import pytest
import torch

PROMPT = "The quick brown fox 敏捷的"


def complete(client, **changes):
    given = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, **changes}
    return client.completions.create(**given)


def test_text_and_ids_of_the_same_prompt_give_the_same(client, engine):
    ids = engine.tokenizer.encode(PROMPT)
    text = complete(client)
    assert text.object == "text_completion" and text.usage.prompt_tokens == len(ids)
    assert complete(client, prompt=ids).choices[0].text == text.choices[0].text


def test_several_prompts_come_back_in_order(client, engine):
    prompts = ["The quick", "狗并不在意", "def add("]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in complete(client, prompt=prompts).choices] == alone
    ids = [engine.tokenizer.encode(prompt) for prompt in prompts]
    answer = complete(client, prompt=ids, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_the_default_length_is_openais(client):
    answer = complete(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_echoed_logprobs_are_those_of_transformers(client, engine, folder, stream):
    from transformers import AutoModelForCausalLM

    ids = engine.tokenizer.encode(PROMPT)
    answer = complete(client, prompt=ids, echo=True, logprobs=2, max_tokens=1, stream=stream)
    parts = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    text = "".join(part.text for part in parts)
    assert text.startswith(PROMPT)
    tokens, given, top, offsets = ([], [], [], [])
    for part in parts:
        if part.logprobs is not None:
            tokens += part.logprobs.tokens
            given += part.logprobs.token_logprobs
            top += part.logprobs.top_logprobs
            offsets += part.logprobs.text_offset
    assert len(tokens) == len(given) == len(top) == len(offsets) == len(ids) + 1
    assert given[0] is None and top[0] is None and offsets[0] == 0
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for position in range(1, len(ids)):
        row = logprobs[position - 1]
        assert math.isclose(given[position], float(row[ids[position]]), abs_tol=1e-3)
        assert math.isclose(max(top[position].values()), float(row.max()), abs_tol=1e-3)
        assert tokens[position] in top[position]
    for position, offset in enumerate(offsets[:-1]):
        if not tokens[position].startswith("bytes:"):
            assert text[offset:].startswith(tokens[position])


def test_a_prompt_can_be_scored_without_generating(client, engine):
    answer = complete(client, echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == PROMPT and answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.tokens) == len(engine.tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_equals_whole(client, echo):
    whole = complete(client, prompt=[PROMPT, "读和写"], echo=echo, temperature=1.4, seed=2, n=2)
    texts = [""] * 4
    for chunk in complete(client, prompt=[PROMPT, "读和写"], echo=echo, temperature=1.4, seed=2, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
