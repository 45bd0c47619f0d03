"""An engine over a model that is being trained says what the model says, adapter and all, after every step of it.

What was computed before an update lies in the cache under the prompt's tokens, and only a new `salt` passes it by.
"""

from itertools import pairwise

import pytest
import torch
from tests.engine.tiny import greedy_uncached, make_model

from hanlin.engine import Engine, SamplingParams
from hanlin.tune import add_lora, without_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The quick brown fox", "敏捷的棕色狐狸", "lazy dog. " * 6]


@torch.no_grad()
def move(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)


@pytest.mark.parametrize("dora", [False, True])
def test_an_engine_follows_the_weights_and_the_adapter_that_it_shares(tokenizer, dora):
    model = make_model(tokenizer).float()
    adapter = add_lora(model, 4, targets="all", dora=dora)
    base = [p for p in model.parameters() if not p.requires_grad]
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    seen = []
    with Engine(model, tokenizer, page_size=4) as engine:
        for version, parameters in enumerate([[], adapter.parameters(), base, adapter.parameters()]):
            move(parameters, seed=version)
            got = [c.token_ids for c in engine.generate(PROMPTS, GREEDY, salt=str(version))]
            assert got == [greedy_uncached(model, ids, 12) for ids in prompts]
            seen.append(got)
        with without_adapter(model):
            got = [c.token_ids for c in engine.generate(PROMPTS, GREEDY, salt="base")]
            assert got == [greedy_uncached(model, ids, 12) for ids in prompts]
        seen.append(got)
    assert all(one != other for one, other in pairwise(seen))
    assert all(p.requires_grad for p in adapter.parameters()) and not any(p.requires_grad for p in base)


def test_an_engine_s_step_leaves_the_model_trainable(tokenizer):
    model = make_model(tokenizer).float()
    adapter = add_lora(model, 4, targets="all")
    move(adapter.parameters(), seed=1)
    ids = torch.tensor([tokenizer.encode(PROMPTS[0])])

    def gradients():
        return torch.autograd.grad(model(ids).logits.logsumexp(-1).sum(), adapter.parameters())

    expected = gradients()
    with Engine(model, tokenizer) as engine:
        engine.generate(PROMPTS, GREEDY)
        assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))
