"""Cached = uncached, batched = single, streamed = whole, token for token; and what happens when things go wrong."""

import threading
import time

import pytest
import torch
from tests.engine.tiny import greedy_uncached, make_model

from hanlin.core.errors import HanlinError
from hanlin.engine import Busy, Engine, SamplingParams

PROMPTS = ["The quick", "敏捷的棕色狐狸", "f", "lazy dog. " * 9, "世界你好！ def f(x)", "x + 1", "The quick brown"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def ids_of(completions):
    return [c.token_ids for c in completions]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    "limits",
    [{}, {"max_batch": 1}, {"max_batch": 3, "step_tokens": 4}, {"max_batch": 2, "page_size": 4}],
    ids=["default", "one by one", "tiny budget", "nothing kept"],
)
def test_batched_and_cached_equals_single_and_uncached(tokenizer, window, limits):
    model = make_model(tokenizer, window=window)
    expected = [greedy_uncached(model, tokenizer.encode(p), 24) for p in PROMPTS]
    with Engine(model, tokenizer, **limits) as engine:
        assert ids_of(engine.generate(PROMPTS, GREEDY)) == expected
        assert ids_of(engine.generate(PROMPTS[::-1], GREEDY)) == expected[::-1]  # now with kept beginnings


def test_prompts_may_be_text_ids_or_messages(engine, tokenizer):
    ids = tokenizer.encode("The quick")
    messages = [{"role": "user", "content": "你好"}]
    text, tokens, alone = engine.generate(["The quick", ids], GREEDY) + engine.generate(ids, GREEDY)
    assert text.token_ids == tokens.token_ids == alone.token_ids
    assert engine.generate(messages, GREEDY)[0].token_ids == engine.generate([messages], GREEDY)[0].token_ids
    assert engine.generate(messages, GREEDY)[0].usage.prompt_tokens == len(tokenizer.chat(messages))
    assert engine.generate([]) == []


def test_streamed_equals_whole(engine):
    for params in (GREEDY, SamplingParams(seed=5, max_tokens=30, stop=("o", "狐狸"), logprobs=2, n=2)):
        for prompt in PROMPTS:
            whole = engine.generate(prompt, params)
            events = list(engine.stream(prompt, params))
            for index, completion in enumerate(whole):
                mine = [e for e in events if e.index == index]
                assert "".join(e.text for e in mine) == completion.text
                assert [t for e in mine for t in e.token_ids] == completion.token_ids
                last = mine[-1].completion
                assert last is not None
                assert (last.text, last.finish_reason) == (completion.text, completion.finish_reason)
                assert all(e.completion is None for e in mine[:-1])
                if params.logprobs is not None:
                    assert [lp for e in mine for lp in e.logprobs or []] == completion.logprobs
                    assert [lp.token_id for lp in completion.logprobs] == completion.token_ids


def test_a_stop_string_ends_the_text_before_it(engine):
    free = engine.generate("The quick", GREEDY)[0]
    for start in range(2, len(free.text) - 2):
        stop = free.text[start : start + 2]
        got = engine.generate("The quick", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=(stop,)))
        assert got[0].text == free.text[: free.text.find(stop)]
        assert got[0].finish_reason == "stop"
        assert got[0].token_ids == free.token_ids[: len(got[0].token_ids)]


def test_a_stop_token_ends_it_and_is_no_text(engine, tokenizer):
    free = engine.generate("The quick", GREEDY)[0]
    token = free.token_ids[5]
    first = free.token_ids.index(token)
    got = engine.generate("The quick", SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=(token,)))[0]
    assert got.token_ids == free.token_ids[: first + 1]
    assert got.text == tokenizer.decode(free.token_ids[:first])
    assert got.finish_reason == "stop"


def test_the_models_end_tokens_end_it_unless_ignored_or_too_early(tokenizer):
    model = make_model(tokenizer)
    free = greedy_uncached(model, tokenizer.encode("The quick"), 24)
    end = free[5]
    first = free.index(end)
    model.config.extra["eos_token_id"] = [end]
    with Engine(model, tokenizer) as engine:
        ends = engine.generate("The quick", SamplingParams(temperature=0, max_tokens=24))[0]
        ignored = engine.generate("The quick", GREEDY)[0]
        late = engine.generate("The quick", SamplingParams(temperature=0, max_tokens=24, min_tokens=first + 2))[0]
    assert (ends.token_ids, ends.finish_reason) == (free[: first + 1], "stop")
    assert ends.text == tokenizer.decode(free[:first])
    assert (ignored.token_ids, ignored.finish_reason) == (free, "length")
    assert late.token_ids[:first] == free[:first]
    assert end not in late.token_ids[: first + 2]


def test_seeded_draws_do_not_depend_on_batch_mates(engine):
    params = SamplingParams(temperature=1.3, top_p=0.95, seed=11, max_tokens=20, ignore_eos=True)
    alone = engine.generate("The quick", params)[0].token_ids
    mates = [SamplingParams(temperature=t, top_k=k, seed=k, max_tokens=30) for t, k in [(0, 0), (2, 5), (1, 0)]]
    among = engine.generate([*PROMPTS[1:4], "The quick"], [*mates, params])[-1].token_ids
    assert alone == among
    other = engine.generate("The quick", SamplingParams(temperature=1.3, top_p=0.95, seed=12, max_tokens=20))[0]
    assert other.token_ids != alone


def test_n_completions_are_independent_ordered_and_repeatable(engine):
    params = SamplingParams(temperature=1.5, n=5, seed=3, max_tokens=12, ignore_eos=True)
    first = engine.generate(["lazy dog. " * 9, "f"], params)
    assert [c.index for c in first] == [0, 1, 2, 3, 4] * 2
    assert len({tuple(c.token_ids) for c in first[:5]}) == 5
    assert ids_of(engine.generate(["lazy dog. " * 9, "f"], params)) == ids_of(first)


def test_a_known_beginning_is_not_computed_again(engine, tokenizer):
    first = engine.generate("lazy dog. " * 9, GREEDY)[0]
    assert first.usage.cached_tokens == 0
    history = tokenizer.encode("lazy dog. " * 9) + first.token_ids
    again = engine.generate(history + tokenizer.encode(" And then"), GREEDY)[0]
    assert again.usage.cached_tokens == (len(history) - 1) // 16 * 16  # whole pages; the last token was never read
    assert again.token_ids == greedy_uncached(engine.model, history + tokenizer.encode(" And then"), 24)


def test_usage_counts_tokens_and_seconds(engine, tokenizer):
    got = engine.generate("The quick", GREEDY)[0].usage
    assert (got.prompt_tokens, got.completion_tokens) == (len(tokenizer.encode("The quick")), 24)
    assert 0 < got.first_token_s < got.total_s
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)
    assert (stats.generated_tokens, stats.finished) == (24, {"length": 1})


def test_the_context_ends_a_completion(tokenizer):
    model = make_model(tokenizer, positions=40)
    with Engine(model, tokenizer) as engine:
        prompt = tokenizer.encode("lazy dog.")
        got = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True))[0]
        assert (len(prompt) + len(got.token_ids), got.finish_reason) == (40, "length")
        assert got.token_ids == greedy_uncached(model, prompt, 40 - len(prompt))
        with pytest.raises(HanlinError, match=r"has 40 tokens.*context is 40"):
            engine.submit([1] * 40)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "empty"), ([], "empty"), ([5, 10**6], "1000000"), ([-1], "-1"), ([3, "x"], "mixture")],
)
def test_a_prompt_that_makes_no_sense_is_refused_at_once(engine, prompt, message):
    with pytest.raises(HanlinError, match=message):
        engine.submit(prompt)


@pytest.mark.parametrize("limits", [{"max_batch": 0}, {"max_context": 10**6}, {"step_tokens": 0}])
def test_limits_out_of_range_are_refused_by_name(model, tokenizer, limits):
    with pytest.raises(HanlinError, match=next(iter(limits))):
        Engine(model, tokenizer, **limits)


def test_abort_frees_the_place(model, tokenizer):
    endless = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
    with Engine(model, tokenizer, max_batch=1) as engine:
        handle = engine.submit("The quick", endless)
        next(iter(handle))
        waiting = engine.submit("f", GREEDY)
        handle.abort()
        last = list(waiting)[-1].completion
        assert last is not None
        assert last.token_ids == greedy_uncached(model, tokenizer.encode("f"), 24)
        assert engine.stats().finished["abort"] == 1
        stream = engine.stream("The quick", endless)
        next(stream)
        stream.close()
        assert engine.generate("f", GREEDY)[0].token_ids == last.token_ids
        assert engine.stats().finished["abort"] == 2


def test_an_aborted_completion_has_what_was_said_so_far(model, tokenizer):
    with Engine(model, tokenizer) as engine:
        handle = engine.submit("The quick", SamplingParams(max_tokens=200, ignore_eos=True, temperature=0))
        events = []
        for event in handle:
            events.append(event)
            if len(events) == 3:
                handle.abort()
        completion = events[-1].completion
        assert completion is not None
        assert completion.finish_reason == "abort"
        assert completion.text == "".join(e.text for e in events)


def test_a_full_queue_is_busy_and_generate_waits_its_turn(model, tokenizer):
    with Engine(model, tokenizer, max_batch=1, max_waiting=2) as engine:
        gate, begun = threading.Event(), threading.Event()

        def hold(_event):
            begun.set()
            gate.wait(10)

        engine.submit("The quick", GREEDY, on_event=hold)
        begun.wait(10)
        waiting = [engine.submit("f", GREEDY) for _ in range(2)]
        with pytest.raises(Busy, match="limit of 3"):
            engine.submit("f", GREEDY)
        assert engine.stats().waiting == 2
        gate.set()
        for handle in waiting:
            assert sum(len(e.token_ids) for e in handle) == 24
        engine.submit("f", GREEDY)
        assert len(engine.generate(["f"] * 9, GREEDY)) == 9
        with pytest.raises(HanlinError, match="n is 4"):
            engine.submit("f", SamplingParams(n=4))


def test_many_threads_get_their_own_answers(engine, tokenizer, model):
    expected = {p: greedy_uncached(model, tokenizer.encode(p), 24) for p in PROMPTS}
    wrong = []

    def ask(prompt):
        for _ in range(3):
            got = [t for e in engine.submit(prompt, GREEDY) for t in e.token_ids]
            if got != expected[prompt]:
                wrong.append((prompt, got))

    threads = [threading.Thread(target=ask, args=(p,)) for p in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert engine.stats().finished == {"length": 3 * len(PROMPTS)}


def test_an_error_in_the_model_reaches_its_request_and_the_engine_lives_on(tokenizer):
    model = make_model(tokenizer)
    expected = greedy_uncached(model, tokenizer.encode("f"), 24)
    with Engine(model, tokenizer) as engine:
        hook = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        handles = [engine.submit(p, GREEDY) for p in ("f", "The quick")]
        for handle in handles:
            with pytest.raises(RuntimeError, match="out of memory"):
                list(handle)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate("f", GREEDY)
        hook.remove()
        assert engine.generate("f", GREEDY)[0].token_ids == expected
        assert engine.stats().finished["error"] == 3


def test_logits_that_are_no_numbers_end_their_request_and_spoil_no_other(tokenizer):
    model = make_model(tokenizer)
    bad = tokenizer.encode("x")[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    good = tokenizer.encode("The quick brown fox jumps")
    assert bad not in good
    with Engine(model, tokenizer, max_batch=2) as engine:
        expected = greedy_uncached(model, good, 24)
        with pytest.raises(HanlinError, match="not finite"):
            engine.generate([[good[0], bad, good[1]] * 9, good], GREEDY)
        assert engine.generate([good, good[:1]], GREEDY)[0].token_ids == expected


def test_a_callback_that_raises_aborts_only_its_request(engine, capsys):
    def fail(_event):
        raise ValueError("my mistake")

    engine.submit("The quick", SamplingParams(max_tokens=200, ignore_eos=True), on_event=fail)
    assert len(engine.generate("f", GREEDY)[0].token_ids) == 24
    deadline = time.monotonic() + 10
    while "abort" not in engine.stats().finished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().finished["abort"] == 1
    assert "my mistake" in capsys.readouterr().err


def test_close_ends_what_runs_and_refuses_what_comes(model, tokenizer):
    engine = Engine(model, tokenizer)
    handle = engine.submit("The quick", SamplingParams(max_tokens=200, ignore_eos=True))
    engine.close()
    assert list(handle)[-1].completion.finish_reason in ("abort", "length")
    with pytest.raises(HanlinError, match="closed"):
        engine.submit("f")
    engine.close()


def test_an_engine_nobody_uses_stops_its_thread(model, tokenizer):
    before = threading.active_count()
    engine = Engine(model, tokenizer)
    engine.generate("f", GREEDY)
    assert threading.active_count() == before + 1
    del engine
    assert threading.active_count() == before
