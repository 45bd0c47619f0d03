"""Guessing tokens changes no text, no draw, no distribution; good guesses are kept, and where it loses it goes off."""

import math
import time
from collections import Counter
from copy import deepcopy
from itertools import product

import pytest
import torch
from tests.engine.test_sampling import chi_square
from tests.engine.tiny import greedy_uncached, make_model

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams
from hanlin.engine.governor import SpeculationGovernor
from hanlin.engine.speculation import common_beginning
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.shared import Shared
from hanlin.models.transformer import Transformer

PROMPTS = ["The quick brown fox", "敏捷的棕色狐狸跳过懒狗。" * 3, "f", "lazy dog. " * 6, "abc abc abc abc"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=20, max_tokens=24, seed=4, n=2, ignore_eos=True)
PENALISED = SamplingParams(temperature=0.7, repetition_penalty=1.3, no_repeat_ngram=3, max_tokens=24, seed=9,
                           min_tokens=8, stop=("o",), logprobs=2)  # fmt: skip


class Always(SpeculationGovernor):
    """Drafts whatever it costs."""

    def drafts(self, sequences):
        return sequences > 0

    def _length(self, sequence):
        return self.most


def make_ahead(tokenizer, *, depth: int = 2, window: int | None = None) -> Transformer:
    torch.manual_seed(1)
    config = ModelConfig.uniform(
        "qwen3", depth=2, attention=AttentionConfig(4, 2, 8, qk_norm=True, window=window),
        feed_forward=FeedForwardConfig(48), vocab_size=tokenizer.size, width=32, max_positions=256,
        predict_ahead=depth,
    )  # fmt: skip
    model = Transformer(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


def open_engine(kind, model, tokenizer, *, draft=None, most: int = 4, **limits) -> Engine:
    engine = Engine(model, tokenizer, speculate=kind, draft=draft, most_drafts=most, **limits)
    if kind != "off":
        engine._worker._drafter._governor = Always(most)
    engine._worker.checking = True
    return engine


def nearly(model: Transformer) -> Transformer:
    """A model that often says the same."""
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return other


def told(completions):
    return [(c.token_ids, c.text, c.finish_reason, c.index) for c in completions]


@pytest.mark.parametrize("limits", [{}, {"step_tokens": 7, "page_size": 4, "max_batch": 3}], ids=str)
@pytest.mark.parametrize("kind", ["ngram", "draft", "mtp"])
def test_the_same_text_with_and_without(tokenizer, kind, limits):
    model = make_ahead(tokenizer) if kind == "mtp" else make_model(tokenizer)
    torch.manual_seed(2)
    draft = nearly(model) if kind == "draft" else None
    with Engine(model, tokenizer, page_size=4) as engine:
        plain = [engine.generate(PROMPTS, params) for params in (GREEDY, DRAWN, PENALISED)]
    assert plain[0][0].token_ids == greedy_uncached(model, tokenizer.encode(PROMPTS[0]), 24)
    with open_engine(kind, model, tokenizer, draft=draft, **limits) as engine:
        for params, want in zip((GREEDY, DRAWN, PENALISED), plain, strict=True):
            for _ in range(2):
                got = engine.generate(PROMPTS, params)
                assert told(got) == told(want)
                if params.logprobs is not None:
                    for mine, theirs in zip(got, want, strict=True):
                        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
                            assert a.logprob == pytest.approx(b.logprob, abs=1e-6)
                            assert [t for t, _ in a.top] == [t for t, _ in b.top]
        stats = engine.stats()
        assert stats.drafted > 0
        assert kind == "mtp" or 0 < stats.accepted < stats.drafted


def test_a_draft_model_that_is_the_model_is_always_right(tokenizer):
    model = make_model(tokenizer)
    with open_engine("draft", model, tokenizer, draft=model) as engine:
        got = engine.generate(PROMPTS, GREEDY)
        assert all(c.usage.accepted == c.usage.drafted > 0 for c in got)
        stats = engine.stats()
        assert stats.accepted == stats.drafted == sum(c.usage.drafted for c in got)
        # 23 tokens behind the first, five a step (four guesses and the one that the model adds): five steps, not 23
        assert stats.steps <= 8
    assert engine._worker._drafter._proposer._states == {}  # ended requests hold no pages of it


def test_ngrams_are_right_where_a_text_repeats_itself(tokenizer):
    model = make_model(tokenizer)
    biased = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logit_bias=((65, 100.0),))
    with open_engine("ngram", model, tokenizer) as engine:
        (got,) = engine.generate("The quick", biased)
        assert got.token_ids == [65] * 24
        assert got.usage.accepted == got.usage.drafted >= 12
        assert engine.stats().steps <= 10


@torch.inference_mode()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_models_own_heads_guess_what_they_guess_without_a_cache(tokenizer, depth):
    model = make_ahead(tokenizer, depth=depth)
    asked = []
    with open_engine("mtp", model, tokenizer, step_tokens=16, page_size=4) as engine:
        proposer = engine._worker._drafter._proposer
        propose = proposer.propose

        def listen(requests, lengths):
            guesses = propose(requests, lengths)
            for request, guess in zip(requests, guesses, strict=True):
                asked.append((request, list(request.ids), guess))
            return guesses

        proposer.propose = listen
        engine.generate(PROMPTS, GREEDY)
    assert len(asked) > 60
    seen = set()
    for request, ids, guess in asked:
        if not guess:  # the last token is not guessed at
            continue
        want = guess_uncached(model, ids)
        assert guess[0] == want[0]
        if request not in seen:  # behind a refused guess a later module has once read a wrong token
            assert guess == want[: len(guess)]
        seen.add(request)
    assert any(len(guess) == depth for _, _, guess in asked)


def guess_uncached(model: Transformer, ids: list[int]) -> list[int]:
    hidden = model(torch.tensor([ids[:-1]]), logits=None).hidden
    shared = Shared(torch.arange(len(ids) - 1)[None], len(ids) - 1, model.dtype, model.config.max_positions)
    draft = model.ahead.draft(
        hidden, torch.tensor([ids[1:]]), embed=model.embed, head=model.logits, run=lambda layer, x: layer(x, shared)
    )
    return draft.ids[0].tolist()


def test_own_heads_over_windows_change_no_text(tokenizer):
    """Their layers forget as the model's last one does, also in the middle of what they have not read."""
    model = make_ahead(tokenizer, window=6)
    expected = [greedy_uncached(model, tokenizer.encode(prompt), 24) for prompt in PROMPTS]
    with open_engine("mtp", model, tokenizer, page_size=4, step_tokens=16) as engine:
        assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == expected
        assert engine.stats().drafted > 0


def test_own_heads_beside_pages_on_the_host_change_no_text(tokenizer):
    model = make_ahead(tokenizer)
    per_token = model.config.kv_bytes_per_token(8) * 2  # with the modules' layers
    prompt = PROMPTS[3] * 2
    expected = greedy_uncached(model, tokenizer.encode(prompt), 24)
    with open_engine(
        "mtp", model, tokenizer, page_size=4, step_tokens=16, cache_bytes=40 * per_token, host_bytes=300 * per_token
    ) as engine:
        assert engine.generate(prompt, GREEDY)[0].token_ids == expected


@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_what_is_drawn_has_the_distribution_of_the_model(tokenizer, kind):
    """Three tokens of top-k 3 against the product of the softmaxes of plain forwards, by chi-square."""
    model = make_model(tokenizer)
    torch.manual_seed(3)
    prompt = tokenizer.encode("abcabcabcabc") if kind == "ngram" else tokenizer.encode("The quick")
    want = chances(model, prompt, k=3, temperature=2.0, length=3)
    draws = 1200
    with open_engine(kind, model, tokenizer, draft=nearly(model) if kind == "draft" else None) as engine:
        params = [
            SamplingParams(temperature=2.0, top_k=3, max_tokens=3, seed=seed, ignore_eos=True) for seed in range(draws)
        ]
        got = Counter(tuple(c.token_ids) for c in engine.generate([prompt] * draws, params))
        stats = engine.stats()
        assert kind == "ngram" or 0 < stats.accepted < stats.drafted
    assert set(got) <= set(want)
    texts = list(want)
    counts, chance = torch.tensor([got[text] for text in texts]), torch.tensor([want[text] for text in texts])
    assert chi_square(counts, chance, draws) < 1.0


@torch.inference_mode()
def chances(model, prompt, *, k, temperature, length) -> dict[tuple[int, ...], float]:
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, chance in found.items():
            values, ids = model(torch.tensor([[*prompt, *text]]), logits="last").logits[0, -1].topk(k)
            weights = [math.exp((v - values[0].item()) / temperature) for v in values.tolist()]
            for token, weight in zip(ids.tolist(), weights, strict=True):
                longer[*text, token] = chance * weight / sum(weights)
        found = longer
    assert len(found) == k**length
    return found


def test_it_goes_off_by_itself_where_it_loses(tokenizer):
    """A draft model that knows nothing and is slow: after a few tries nobody asks it."""
    model, useless = make_model(tokenizer), make_ahead(tokenizer)
    calls = Counter()

    def slow(*_):
        calls["draft"] += 1
        time.sleep(0.003)

    useless.register_forward_pre_hook(slow)
    with Engine(model, tokenizer, speculate="draft", draft=useless, most_drafts=4) as engine:
        (got,) = engine.generate("f", SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
        assert got.usage.completion_tokens == 150
        assert 0 < calls["draft"] < 60  # 150 steps of up to four tokens each
        assert got.usage.drafted < 60


def test_what_cannot_guess_is_refused_by_name(model, tokenizer):
    with pytest.raises(HanlinError, match="predict_ahead"):
        Engine(model, tokenizer, speculate="mtp")
    with pytest.raises(HanlinError, match="draft"):
        Engine(model, tokenizer, speculate="draft")
    with pytest.raises(HanlinError, match="draft"):
        Engine(model, tokenizer, draft=model)
    other = Transformer(ModelConfig.uniform(
        "llama", depth=1, attention=AttentionConfig(1, 1, 4), feed_forward=FeedForwardConfig(4), vocab_size=7, width=4
    ))  # fmt: skip
    with pytest.raises(HanlinError, match="7 tokens"):
        Engine(model, tokenizer, speculate="draft", draft=other)
    with pytest.raises(HanlinError, match="ngram"):
        Engine(model, tokenizer, speculate="guess")


def test_a_common_beginning_is_counted_from_the_front():
    for a, b in product(map(list, product((0, 1), repeat=3)), map(list, product((0, 1), repeat=3))):
        want = next((i for i in range(3) if a[i] != b[i]), 3)
        assert common_beginning(a, b) == common_beginning([*a, 5], b) == want
