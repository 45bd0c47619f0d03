"""Where things end: too long, too many, aborted, closed; every token's log-probability; embeddings; encoders beside
decoders; products of one height; and all of it at once."""

import json
import threading
import time

import pytest
import torch
from tests.engine.test_families import agrees, last_logits
from tests.engine.test_speculation import Always
from tests.engine.tiny import greedy_uncached, make_model
from tests.models.cases import all_cases, inputs_of, reference_model
from tests.models.ours import load_ours

from hanlin.core.errors import HanlinError
from hanlin.engine import Constraint, Engine, SamplingParams
from hanlin.kernels.library import library

PROMPTS = ["The quick brown fox", "敏捷的棕色狐狸跳过懒狗。", "f", "lazy dog. " * 6]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def completion_of(handle):
    return list(handle)[-1].completion


def test_a_prompt_longer_than_the_pages_is_refused_with_what_to_raise(model, tokenizer):
    size = model.config.kv_bytes_per_token(8)
    with Engine(model, tokenizer, cache_bytes=64 * size, page_size=4) as engine:
        assert engine.max_context == 64
        with pytest.raises(HanlinError, match=r"64.*(cache_bytes|max_context)"):
            engine.submit([5] * 70, GREEDY)
        got = engine.generate([5] * 40, ENDLESS)[0]
        assert (len(got.token_ids), got.finish_reason) == (24, "length")
    with pytest.raises(HanlinError, match=r"max_context is 200.*cache_bytes and host_bytes hold 64"):
        Engine(model, tokenizer, cache_bytes=64 * size, page_size=4, max_context=200)


@pytest.mark.parametrize("window", [None, 9])
def test_a_prompt_longer_than_the_pages_streams_what_lies_on_the_host(tokenizer, window):
    model = make_model(tokenizer, window=window)
    size = model.config.kv_bytes_per_token(8)
    prompt = tokenizer.encode(PROMPTS[3] * 3)
    assert len(prompt) > 80
    with Engine(model, tokenizer, cache_bytes=40 * size, host_bytes=200 * size, page_size=4, step_tokens=16) as engine:
        engine._worker.checking = True
        got = engine.generate([prompt, PROMPTS[0], prompt[:30]], GREEDY)
        want = [prompt, tokenizer.encode(PROMPTS[0]), prompt[:30]]
        assert [c.token_ids for c in got] == [greedy_uncached(model, ids, 12) for ids in want]
        assert engine.stats().cache_usage == 0


def test_a_thousand_completions_of_one_prompt_wait_for_their_turn(model, tokenizer):
    params = SamplingParams(temperature=1.5, seed=1, n=1000, max_tokens=2, ignore_eos=True)
    with Engine(model, tokenizer, max_waiting=8, page_size=4) as engine:
        with pytest.raises(HanlinError, match="n is 1000"):
            engine.submit(PROMPTS[3], params)
        got = engine.generate(PROMPTS[3], params)
        assert [c.index for c in got] == list(range(1000))
        assert len({tuple(c.token_ids) for c in got}) > 50
        few = engine.generate(PROMPTS[3], SamplingParams(temperature=1.5, seed=1, n=3, max_tokens=2, ignore_eos=True))
        assert [c.token_ids for c in few] == [c.token_ids for c in got[:3]]
        assert engine.stats().cache_usage == 0


def test_aborted_while_it_waits(model, tokenizer):
    with Engine(model, tokenizer, max_batch=1) as engine:
        first = engine.submit(PROMPTS[0], ENDLESS)
        waiting = engine.submit(PROMPTS[1], ENDLESS)
        next(iter(first))
        second = engine.submit(PROMPTS[2], ENDLESS)
        waiting.abort()
        got = completion_of(waiting)
        assert (got.finish_reason, got.token_ids, got.text) == ("abort", [], "")
        second.abort()
        second.abort()
        assert completion_of(second).finish_reason == "abort"
        assert engine.stats().finished["abort"] >= 2
        assert engine.stats().waiting == 0


def test_aborted_while_it_loads_and_closed_while_it_loads(model, tokenizer, tmp_path):
    prompt = tokenizer.encode(PROMPTS[3])
    with Engine(model, tokenizer, page_size=4, disk_folder=tmp_path) as engine:
        want = engine.generate([prompt], GREEDY)[0].token_ids
    for close in (False, True):
        engine = Engine(model, tokenizer, page_size=4, disk_folder=tmp_path)
        disk, gate = engine._memory.tiers.disk, threading.Event()
        disk.flush()
        read = disk._read
        disk._read = lambda *args, read=read, gate=gate: gate.wait(20) and read(*args)
        handle = engine.submit(prompt, GREEDY)
        deadline = time.monotonic() + 10
        while not engine._worker._scheduler.loading and time.monotonic() < deadline:
            time.sleep(0.001)
        handle.abort()
        threading.Timer(0.05, gate.set).start()
        if close:
            engine.close()
        assert completion_of(handle).finish_reason == "abort"
        if not close:
            assert engine.generate([prompt], GREEDY)[0].token_ids == want
            assert engine.stats().cache_usage == 0
            engine.close()


def test_closing_answers_everybody(model, tokenizer):
    engine = Engine(model, tokenizer, max_batch=2)
    handles = [engine.submit(prompt, ENDLESS) for prompt in PROMPTS * 2]
    next(iter(handles[0]))
    engine.close()
    assert all(completion_of(handle).finish_reason in ("abort", "length") for handle in handles)


@pytest.mark.parametrize(
    "limits", [{}, {"step_tokens": 5, "page_size": 4}, {"step_tokens": 16, "page_size": 4, "tokens": 88}], ids=str
)
def test_prompt_logprobs_are_those_of_a_plain_forward(model, tokenizer, limits):
    """In pieces, and when it is preempted in the middle."""
    limits = dict(limits)
    if tokens := limits.pop("tokens", None):
        limits["cache_bytes"] = tokens * model.config.kv_bytes_per_token(8)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, prompt_logprobs=3, logprobs=-1)
    with Engine(model, tokenizer, **limits) as engine:
        for _ in range(2):  # known beginnings do not make them shorter
            got = engine.generate(PROMPTS, params)
            for prompt, completion in zip(PROMPTS, got, strict=True):
                check_logprobs(model, tokenizer.encode(prompt), completion)
        assert not tokens or engine.stats().preemptions > 0


@torch.inference_mode()
def check_logprobs(model, prompt, completion):
    whole = torch.tensor([prompt + completion.token_ids])
    rows = model(whole).logits[0].float().log_softmax(-1)
    assert [t.token_id for t in completion.prompt_logprobs] == prompt[1:]
    for row, told in zip(rows, completion.prompt_logprobs, strict=False):
        assert told.logprob == pytest.approx(row[told.token_id].item(), abs=1e-5)
        assert [t for t, _ in told.top] == row.topk(3).indices.tolist()
    for row, told in zip(rows[len(prompt) - 1 :], completion.logprobs, strict=False):
        assert len(told.top) == rows.shape[1]
        values = torch.empty(rows.shape[1])
        values[[t for t, _ in told.top]] = torch.tensor([value for _, value in told.top])
        torch.testing.assert_close(values, row, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_embeddings_are_the_mean_of_a_plain_forward(model, tokenizer):
    with Engine(model, tokenizer) as engine:
        handle = engine.submit(PROMPTS[0], ENDLESS)
        got = engine.embed(PROMPTS)
        handle.abort()
        assert torch.equal(engine.embed(PROMPTS[1])[0], got[1])
    for prompt, row in zip(PROMPTS, got, strict=True):
        hidden = model(torch.tensor([tokenizer.encode(prompt)])).hidden[0].float().mean(0)
        torch.testing.assert_close(row, hidden / hidden.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_beside_an_encoder_reads_its_own_source_whatever_gives_way(name, tokenizer, tmp_path):
    """Sources that decode alike share nothing, and n completions of one source share all."""
    case = next(case for case in all_cases() if case.kind == "encoder-decoder" and case.family == name)
    model = load_ours(case, reference_model(case), tmp_path)
    sources = inputs_of(case, rows=6).source[:, :11]
    size = model.config.kv_bytes_per_token(4)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, n=2)
    with Engine(model, tokenizer, page_size=1, cache_bytes=60 * size, max_batch=8) as engine:
        engine._worker.checking = True
        for _ in range(2):
            got = engine.generate(sources.tolist(), params)
            for number, completion in enumerate(got):
                source = sources[number // 2]
                want = decode(model, source, 16)
                assert agrees(want, completion.token_ids, lambda ids, s=source: last_logits(model, s, ids))
        assert engine.stats().preemptions > 0
        assert engine._worker._sources.keys() <= {(tuple(source), None) for source in sources.tolist()}


def decode(model, source, count):
    ids = []
    for _ in range(count):
        ids.append(int(last_logits(model, source, ids).argmax()))
    return ids


@pytest.mark.skipif(library() is None, reason="attention by torch rounds differently in batches of other sizes")
def test_products_of_one_height_give_a_token_the_same_numbers_in_every_company(tokenizer):
    """fp32, the products by the matrix library: alone, in a batch, behind known pages, to the last bit."""
    model = make_model(tokenizer).float()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=-1)
    with Engine(model, tokenizer, pad_products=True, step_tokens=64) as engine:
        alone = [engine.generate([prompt], params, salt=prompt)[0] for prompt in PROMPTS]
        together = [engine.submit(prompt, params, salt="all") for prompt in PROMPTS]
        for one, handle in zip(alone, together, strict=True):
            other = completion_of(handle)
            assert other.token_ids == one.token_ids
            assert other.logprobs == one.logprobs
        again = engine.generate(PROMPTS, params, salt="all")
        assert again[3].usage.cached_tokens > 0
        assert [c.logprobs for c in again] == [c.logprobs for c in alone]


@pytest.mark.parametrize("speculate", ["off", "ngram", "draft"])
def test_constraints_hold_in_all_completions_when_guesses_fail_and_pages_run_out(tokenizer, speculate):
    model = make_model(tokenizer)
    schema = {"type": "object", "properties": {"狐": {"type": "integer"}, "b": {"enum": ["x", "dog"]}},
              "required": ["狐", "b"], "additionalProperties": False}  # fmt: skip
    params = SamplingParams(
        temperature=1.0, seed=3, n=4, max_tokens=40, constraint=Constraint("json_schema", json.dumps(schema))
    )
    free = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [PROMPTS[0], PROMPTS[1]]
    size = model.config.kv_bytes_per_token(8)
    results = []
    for limits in ({}, {"cache_bytes": 150 * size, "step_tokens": 24, "speculate": speculate}):
        draft = model if limits and speculate == "draft" else None
        with Engine(model, tokenizer, page_size=4, draft=draft, most_drafts=3, **limits) as engine:
            if limits and speculate != "off":
                engine._worker._drafter._governor = Always(3)
            engine._worker.checking = True
            beside = engine.submit(PROMPTS[3], free)
            got = engine.generate(prompts, params)
            assert completion_of(beside).token_ids == greedy_uncached(model, tokenizer.encode(PROMPTS[3]), 40)
            assert not limits or engine.stats().preemptions > 0
            assert not limits or speculate == "off" or engine.stats().drafted > 0
        for completion in got:
            if completion.finish_reason == "stop":
                value = json.loads(completion.text)
                assert isinstance(value["狐"], int)
                assert value["b"] in ("x", "dog")
        assert any(completion.finish_reason == "stop" for completion in got)
        results.append([completion.token_ids for completion in got])
    assert results[0] == results[1]


def test_what_everything_forbids_spoils_nobody_with_the_same_beginning(tokenizer):
    """A request that may say nothing ends with an error; who shares its pages reads on undisturbed."""
    model = make_model(tokenizer)
    prompt = tokenizer.encode(PROMPTS[3])
    nothing = tuple((token,) for token in range(tokenizer.size))
    with Engine(model, tokenizer, page_size=4) as engine:
        begun, got = threading.Event(), []
        done = threading.Event()

        def hear(event):
            got.extend(event.token_ids)
            begun.set()
            if event.completion is not None:
                done.set()

        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), on_event=hear)
        begun.wait(10)
        with pytest.raises(HanlinError, match="forbidden"):
            engine.generate([prompt], SamplingParams(temperature=0, bad_words=nothing))
        assert done.wait(20)
        assert got == greedy_uncached(model, prompt, 100)
        assert engine.generate([prompt], GREEDY)[0].token_ids == greedy_uncached(model, prompt, 12)
