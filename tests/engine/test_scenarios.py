"""Whatever is submitted, aborted and finished, in whatever order and with however little memory: each request gets the
greedy text of the plain forward, and after every step each page is free or in exactly as many tables as hold it.

A mismatch counts where the reference's two best logits lie more than 1e-4 apart: products of other heights round
otherwise.
"""

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.engine.test_families import agrees
from tests.engine.tiny import make_model

from hanlin.engine import Engine, SamplingParams
from hanlin.models.config import AttentionConfig, FeedForwardConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.rope import Rope
from hanlin.tokens import Tokenizer

LONGEST = 24
KINDS = ("full", "mixed", "window", "latent")
TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。世界你好！ def f(x): return x + 1\n"


@cache
def some_tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator([TEXT * 20] * 5, vocab_size=330)


@cache
def model_of(kind: str) -> Transformer:
    torch.manual_seed(0)
    if kind == "full":
        return make_model(some_tokenizer()).float()
    windows = {"mixed": [None, 7, None], "window": [5, 5]}
    if kind == "latent":
        attentions = [LatentAttentionConfig(4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, position=Rope())] * 2
    else:
        attentions = [AttentionConfig(4, 2, 8, window=window) for window in windows[kind]]
    layers = tuple(LayerConfig(attention, FeedForwardConfig(48)) for attention in attentions)
    config = ModelConfig("llama", some_tokenizer().size, 32, layers, max_positions=256)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


@cache
def prompts() -> list[list[int]]:
    """Some that begin alike, some that repeat themselves, one of a single token."""
    draw = random.Random(1)
    size = some_tokenizer().size
    found = [[draw.randrange(size) for _ in range(draw.randrange(2, 50))] for _ in range(6)]
    found += [found[0][: draw.randrange(1, len(found[0]))] + found[1] for _ in range(2)]
    return [*found, [7, 8, 9] * 9, [3]]


@cache
def truth(kind: str, prompt: int) -> list[int]:
    ids = list(prompts()[prompt])
    for _ in range(LONGEST):
        ids.append(int(logits_after(kind, ids).argmax()))
    return ids[len(prompts()[prompt]) :]


@torch.inference_mode()
def logits_after(kind: str, ids: list[int]) -> torch.Tensor:
    return model_of(kind)(torch.tensor([ids]), logits="last").logits[0, -1]


class Life(RuleBasedStateMachine):
    """An engine with random limits, and a random life."""

    @initialize(
        kind=st.sampled_from(KINDS),
        page=st.sampled_from([1, 4, 16]),
        budget=st.sampled_from([1, 3, 16, 512]),
        batch=st.sampled_from([1, 3, 64]),
        tokens=st.sampled_from([110, 140, 4000]),
        host=st.sampled_from([0, 200]),
        padded=st.booleans(),
        speculate=st.sampled_from(["off", "ngram", "draft"]),
    )
    def open(self, kind, page, budget, batch, tokens, host, padded, speculate):
        self.kind, self.open_handles = kind, []
        model = model_of(kind)
        size = model.config.kv_bytes_per_token(4)
        self.engine = Engine(
            model,
            some_tokenizer(),
            draft=model if speculate == "draft" else None,
            page_size=page,
            step_tokens=min(budget, 16) if padded else budget,
            max_batch=batch,
            cache_bytes=tokens * size,
            host_bytes=host * size,
            pad_products=padded,
            speculate=speculate,
            most_drafts=3,
        )
        self.engine._worker.checking = True

    @rule(
        prompt=st.integers(0, 9),
        new=st.integers(1, LONGEST),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "b"]),
        told=st.booleans(),
    )
    def submit(self, prompt, new, n, priority, salt, told):
        params = SamplingParams(
            max_tokens=new, temperature=0, ignore_eos=True, n=n, prompt_logprobs=0 if told and n == 1 else None
        )
        handle = self.engine.submit(prompts()[prompt], params, priority=priority, salt=salt)
        self.open_handles.append((prompt, new, handle))

    @rule(which=st.integers(0, 20))
    def abort(self, which):
        if self.open_handles:
            prompt, _, handle = self.open_handles.pop(which % len(self.open_handles))
            handle.abort()
            for event in handle:
                if event.completion is not None:
                    got = event.completion.token_ids
                    self.compare(prompt, truth(self.kind, prompt)[: len(got)], got)

    @rule(which=st.integers(0, 20))
    def finish(self, which):
        if self.open_handles:
            self.wait_for(*self.open_handles.pop(which % len(self.open_handles)))

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "engine"):
            assert self.engine._worker._thread.is_alive()

    def teardown(self):
        if hasattr(self, "engine"):
            for one in self.open_handles:
                self.wait_for(*one)
            assert self.engine.stats().cache_usage == 0
            assert "error" not in self.engine.stats().finished
            self.engine.close()

    def wait_for(self, prompt, new, handle):
        for event in handle:
            if event.completion is not None:
                self.compare(prompt, truth(self.kind, prompt)[:new], event.completion.token_ids)
                told = event.completion.prompt_logprobs
                assert told is None or len(told) == len(prompts()[prompt]) - 1

    def compare(self, prompt, want, got):
        assert agrees(want, got, lambda ids: logits_after(self.kind, prompts()[prompt] + ids)), (want, got)


quick = settings(
    max_examples=500, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestLife = Life.TestCase
TestLife.settings = quick
TestLife = pytest.mark.filterwarnings("ignore::ResourceWarning")(TestLife)
