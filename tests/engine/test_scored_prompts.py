"""Prompts scored from a place on: the numbers as when all is scored, and what stands before may be cached."""

import pytest
import torch
from tests.engine.tiny import make_model

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams

DEMONSTRATION = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。世界你好！"
ENDINGS = ["def f(x): return x + 1", "世界你好！", "The lazy fox.", "狐狸"]


def scored(start: int) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=2, prompt_logprobs_from=start)


@pytest.mark.parametrize(
    "limits",
    [{}, {"step_tokens": 7, "page_size": 4}, {"step_tokens": 16, "page_size": 4, "tokens": 88}],
    ids=["whole", "in pieces", "preempted"],
)
def test_scores_from_a_place_on_are_the_last_of_all_scores(model, tokenizer, limits):
    limits = dict(limits)
    if tokens := limits.pop("tokens", None):
        limits["cache_bytes"] = tokens * model.config.kv_bytes_per_token(8)
    prompts = [[*tokenizer.encode(DEMONSTRATION), *tokenizer.encode(ending)] for ending in ENDINGS]
    start = len(tokenizer.encode(DEMONSTRATION))
    with Engine(model, tokenizer, **limits) as engine:
        for _ in range(2):
            for prompt, completion in zip(prompts, engine.generate(prompts, scored(start)), strict=True):
                with torch.inference_mode():
                    rows = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
                told = completion.prompt_logprobs
                assert [each.token_id for each in told] == prompt[start:]
                wanted = rows[start - 1 : -1].gather(1, torch.tensor(prompt[start:])[:, None])[:, 0]
                assert [each.logprob for each in told] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_what_stands_before_the_scores_comes_from_the_cache_and_nothing_of_them_does(model, tokenizer):
    start = len(tokenizer.encode(DEMONSTRATION))
    prompt = [*tokenizer.encode(DEMONSTRATION), *tokenizer.encode(ENDINGS[0])]
    with Engine(model, tokenizer, page_size=4) as engine:
        first, again = (engine.generate([prompt], scored(start))[0] for _ in range(2))
        (whole,) = engine.generate([prompt], scored(1))
        for place in range(5, 12):  # wherever it lies in its page
            (told,) = engine.generate([prompt], scored(place))
            assert [each.token_id for each in told.prompt_logprobs] == prompt[place:]
            assert told.usage.cached_tokens == (place - 1) // 4 * 4
    assert (first.usage.cached_tokens, whole.usage.cached_tokens) == (0, 0)
    assert again.usage.cached_tokens == (start - 1) // 4 * 4 > 0
    assert len(whole.prompt_logprobs) == len(prompt) - 1


def test_a_start_behind_the_prompt_scores_nothing_and_one_before_it_is_refused(tokenizer):
    with Engine(make_model(tokenizer), tokenizer) as engine:
        (done,) = engine.generate(["世界"], scored(10_000))
    assert done.prompt_logprobs == []
    with pytest.raises(HanlinError, match="prompt_logprobs_from is 0; it must be at least 1"):
        scored(0)
