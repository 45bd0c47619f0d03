"""Every parameter that is accepted changes what it says it changes."""

import itertools
import json
import math
import re

import pytest
from tests.serve.tiny import post

QUESTION = [{"role": "user", "content": "敏捷的 fox？"}]
CHAT = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
TEXT = {"prompt": "The quick 敏捷的", "temperature": 0, "max_tokens": 40, "ignore_eos": True}
LIVELY = {"temperature": 2.0, "seed": 3}


def ask(address, **changes) -> dict:
    response = post(address, "/v1/chat/completions", {**CHAT, **changes})
    assert response.status_code == 200, response.text
    return response.json()


def text(address, **changes) -> str:
    return ask(address, **changes)["choices"][0]["message"]["content"]


def ids(address, **changes) -> list[int]:
    return ask(address, return_token_ids=True, **changes)["choices"][0]["token_ids"]


def test_ids_are_the_tokens_of_prompt_and_answer(address, engine):
    answer = ask(address, return_token_ids=True)
    assert answer["prompt_token_ids"] == engine.tokenizer.chat(QUESTION)
    assert engine.tokenizer.decode(answer["choices"][0]["token_ids"]) == answer["choices"][0]["message"]["content"]
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


def test_a_bias_of_a_hundred_decides_and_of_minus_a_hundred_forbids(address):
    usual = ids(address)
    assert set(ids(address, logit_bias={"300": 100}, max_tokens=5)) == {300}
    assert usual[0] not in ids(address, logit_bias={str(usual[0]): -100})


def test_penalties_against_repetition_act(address):
    usual = ids(address, max_tokens=120)
    repeated = len(usual) - len(set(usual))
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 2.0}):
        punished = ids(address, max_tokens=120, **penalty)
        assert punished != usual
        assert len(punished) - len(set(punished)) < repeated, penalty
    pairs = ids(address, max_tokens=120, no_repeat_ngram_size=2)
    assert len(set(itertools.pairwise(pairs))) == len(pairs) - 1
    dry = ids(address, max_tokens=120, dry_multiplier=20.0, dry_base=2.0, dry_allowed_length=2)
    assert dry != usual
    broken = ids(
        address, max_tokens=120, dry_multiplier=20.0, dry_base=2.0, dry_sequence_breakers=list("abcdefghij 狗")
    )
    assert broken != dry or dry == usual


def test_bad_words_are_never_written(address, engine):
    usual = text(address)
    word = engine.tokenizer.decode(ids(address)[:1])
    assert word and word in usual
    assert word not in text(address, bad_words=[word]) or len(engine.tokenizer.encode(word)) > 1


def test_filters_act(address):
    greedy = text(address)
    assert text(address, **LIVELY) != greedy
    for taming in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert text(address, **LIVELY | taming) == greedy
    typical = [text(address, temperature=2.0, seed=seed, typical_p=1e-6) for seed in (1, 2)]
    assert typical[0] == typical[1] != greedy  # one token is nearest to the entropy, and it is not the likeliest
    cold, late = (text(address, **LIVELY, min_p=0.3, temperature_last=last) for last in (False, True))
    assert cold != late


def test_the_stop_string_may_be_kept(address):
    whole = text(address)
    stop = whole[10:13]
    end = whole.index(stop)
    assert text(address, stop=stop) == whole[:end]
    assert text(address, stop=stop, include_stop_str_in_output=True) == whole[:end] + stop


def test_nothing_ends_an_answer_before_its_least_length(address, engine):
    first = ids(address)[0]
    free = ask(address, stop_token_ids=[first])
    assert free["usage"]["completion_tokens"] == 1
    forced = ask(address, stop_token_ids=[first], min_tokens=10)
    assert forced["usage"]["completion_tokens"] >= 10


def test_special_tokens_are_seen_on_request(address, engine):
    special = next(i for i in engine.tokenizer.special.values() if i not in engine.tokenizer.stop_ids)
    spelling = engine.tokenizer.token_bytes(special).decode()
    biased = {"logit_bias": {str(special): 100}, "max_tokens": 3}
    assert text(address, **biased) == ""
    for stream in (False, True):
        response = post(
            address, "/v1/chat/completions", {**CHAT, **biased, "skip_special_tokens": False} | {"stream": stream}
        )
        if stream:
            lines = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
            assert "".join(line["choices"][0]["delta"].get("content") or "" for line in lines) == spelling * 3
        else:
            assert response.json()["choices"][0]["message"]["content"] == spelling * 3
    answer = post(address, "/v1/completions", TEXT | biased | {"skip_special_tokens": False}).json()
    assert answer["choices"][0]["text"] == spelling * 3


@pytest.mark.parametrize(
    ("form", "matches"),
    [
        ({"guided_regex": "[ab]{3}狗"}, lambda found: re.fullmatch("[ab]{3}狗", found)),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, lambda found: re.fullmatch("[ab]{3}", found)),
        ({"guided_choice": ["猫咪", "dog"]}, lambda found: found in ("猫咪", "dog")),
        ({"structured_outputs": {"choice": ["猫咪", "dog"]}}, lambda found: found in ("猫咪", "dog")),
        ({"guided_grammar": 'start: "y" "x" | "z" dog\ndog: "狗"'}, lambda found: found in ("yx", "z狗")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, "二"]}}}},
         lambda found: json.loads(found) in (1, "二")),
        ({"guided_json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}},
         lambda found: len(json.loads(found)) == 2),
        ({"guided_json": '{"type": "boolean"}'}, lambda found: isinstance(json.loads(found), bool)),
        ({"json_schema": {"const": "a"}}, lambda found: json.loads(found) == "a"),
    ],
)  # fmt: skip
def test_answers_have_the_form_that_was_asked_for(address, form, matches):
    for temperature in (0.0, 1.0):
        changes = {"temperature": temperature, "seed": 1, "ignore_eos": False, "max_tokens": 200}
        answer = ask(address, **changes | form)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert matches(answer["choices"][0]["message"]["content"])
    answer = post(address, "/v1/completions", TEXT | {"ignore_eos": False, "max_tokens": 200} | form).json()
    assert matches(answer["choices"][0]["text"])


def test_a_form_that_cannot_be_is_a_mistake_of_the_clients(address):
    for form in ({"guided_regex": "("}, {"guided_json": {"type": "nonsense"}}, {"guided_grammar": "start: ("}):
        assert post(address, "/v1/chat/completions", CHAT | form).status_code == 400, form


def test_the_prompts_logprobs_come_in_vllms_form(address, engine):
    answer = ask(address, prompt_logprobs=2, max_tokens=1)
    prompt = engine.tokenizer.chat(QUESTION)
    assert answer["prompt_logprobs"][0] is None and len(answer["prompt_logprobs"]) == len(prompt)
    for token, entry in zip(prompt[1:], answer["prompt_logprobs"][1:], strict=True):
        assert str(token) in entry and 2 <= len(entry) <= 3
        best = [value for value in entry.values() if value["rank"] == 1]
        assert len(best) == 1 and best[0]["logprob"] == max(value["logprob"] for value in entry.values())
    scored = post(address, "/v1/completions", TEXT | {"echo": True, "logprobs": 1, "prompt_logprobs": 1}).json()
    own = scored["choices"][0]["logprobs"]["token_logprobs"]
    for token, logprob, entry in zip(
        engine.tokenizer.prompt(TEXT["prompt"])[1:], own[1:], scored["choices"][0]["prompt_logprobs"][1:], strict=False
    ):
        assert math.isclose(entry[str(token)]["logprob"], logprob, abs_tol=1e-4)


def test_beams_find_a_likelier_answer_than_greed(address):
    def likelihood(**changes):
        body = TEXT | {"max_tokens": 12, "return_token_ids": True} | changes
        choice = post(address, "/v1/completions", body).json()["choices"][0]
        whole = choice["prompt_token_ids"] + choice["token_ids"]
        scored = {"prompt": whole, "max_tokens": 0, "echo": True, "logprobs": 0}
        choice = post(address, "/v1/completions", scored).json()["choices"][0]
        return sum(choice["logprobs"]["token_logprobs"][-12:])

    assert likelihood(use_beam_search=True, n=1, best_of=4) > likelihood()
    answer = post(address, "/v1/completions", TEXT | {"use_beam_search": True, "n": 3}).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 3


def test_the_length_penalty_says_how_long_the_best_beam_is(address):
    ends = list(range(8, 420, 3))  # a third of all tokens: beams of every length end

    def length(penalty):
        body = TEXT | {"use_beam_search": True, "best_of": 4, "length_penalty": penalty, "stop_token_ids": ends}
        return post(address, "/v1/completions", body).json()["usage"]["completion_tokens"]

    assert length(-5.0) < length(5.0)


def test_the_best_of_several_is_returned(address):
    def mean(choice):
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    lively = TEXT | LIVELY | {"logprobs": 0, "max_tokens": 8}
    all_of_them = post(address, "/v1/completions", lively | {"n": 4}).json()["choices"]
    best = post(address, "/v1/completions", lively | {"n": 1, "best_of": 4}).json()["choices"]
    assert len(best) == 1
    assert math.isclose(mean(best[0]), max(map(mean, all_of_them)), abs_tol=1e-3)


def test_contrastive_search_leaves_the_greedy_path(address):
    contrasted = text(address, penalty_alpha=0.9, top_k=4)
    assert contrasted != text(address)


def test_an_unfinished_turn_is_continued(address, engine):
    begun = [*QUESTION, {"role": "assistant", "content": "The quick"}]
    changes = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    answer = ask(address, return_token_ids=True, **changes)
    expected = engine.tokenizer.chat(QUESTION) + engine.tokenizer.encode("The quick")
    assert answer["prompt_token_ids"] == expected
    continued = answer["choices"][0]["message"]["content"]
    assert text(address, echo=True, **changes) == "The quick" + continued
    without = ask(address, return_token_ids=True, add_generation_prompt=False)
    assert without["prompt_token_ids"] == engine.tokenizer.chat(QUESTION, generate=False)


def test_the_request_id_is_the_answers(address):
    assert ask(address, request_id="abc-1")["id"] == "chatcmpl-abc-1"
    assert post(address, "/v1/completions", TEXT | {"request_id": "b"}).json()["id"] == "cmpl-b"


def test_salts_part_the_cache(address):
    changes = {"messages": [{"role": "user", "content": "读和写是一枚硬币的两面。" * 8}], "max_tokens": 1}

    def cached(salt):
        return ask(address, cache_salt=salt, **changes)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("another") == 0


def test_usage_comes_with_every_chunk_on_request(address):
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = post(address, "/v1/chat/completions", CHAT | {"stream": True, "stream_options": options})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == counts[-2] == 40


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_carry_the_ids_too(address, path):
    body = (CHAT if "chat" in path else TEXT) | {"return_token_ids": True}
    whole = post(address, path, body).json()
    response = post(address, path, body | {"stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]
    prompts = [chunk.get("prompt_token_ids") or chunk["choices"][0].get("prompt_token_ids") for chunk in chunks]
    assert prompts[0] == (whole.get("prompt_token_ids") or whole["choices"][0]["prompt_token_ids"])
