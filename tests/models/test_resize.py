"""A resized vocabulary keeps what was there; new rows begin as they were asked to; head and bias follow."""

from dataclasses import replace

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, load_model, save_model
from hanlin.models.config import HeadConfig
from hanlin.models.resize import resize_token_embeddings


def make(tied: bool, *, bias: bool = False) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "qwen3", depth=2, attention=AttentionConfig(4, 2, 8, qk_norm=True), feed_forward=FeedForwardConfig(48),
        vocab_size=50, width=32, tied_embeddings=tied,
    )  # fmt: skip
    model = Transformer(replace(config, head=HeadConfig(bias=bias)))
    if bias:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["mean", "pieces", "copy"])
def test_new_rows_begin_as_asked_and_old_logits_stay(tied, how, tmp_path):
    model, ids = make(tied, bias=True), torch.randint(0, 50, (2, 7))
    before, old = model(ids).logits, model.model.embed_tokens.weight.clone()
    bias, head = model.lm_head.bias.clone(), model.lm_head.weight.clone()
    pieces = [[3, 9, 9], [49], [0, 1]]
    more = {"pieces": {"pieces": pieces}, "copy": {"copy": [7, 7, 2]}, "mean": {}}[how]
    resize_token_embeddings(model, 53, **more)
    rows = {"pieces": pieces, "copy": [[7], [7], [2]], "mean": [list(range(50))] * 3}[how]
    for number, sources in enumerate(rows):
        now = (model.model.embed_tokens.weight, model.lm_head.weight, model.lm_head.bias)
        for found, was in zip(now, (old, head, bias), strict=True):
            torch.testing.assert_close(found[50 + number], sum(was[i] for i in sources) / len(sources))
    after = model(ids).logits
    assert after.shape[-1] == 53 and torch.equal(after[..., :50], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.parameter_count() == model.config.parameters().total


def test_a_resized_model_is_saved_and_loaded(tmp_path):
    model = make(tied=True)
    resize_token_embeddings(model, 64)
    save_model(model, tmp_path)
    assert load_model(tmp_path).config.vocab_size == 64
    resize_token_embeddings(model, 40)
    save_model(model, tmp_path)
    ids = torch.randint(0, 40, (1, 5))
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("size", "more", "message"),
    [
        (0, {}, "at least one token"),
        (52, {"copy": [1]}, "2 tokens are new"),
        (51, {"copy": [50]}, "0 … 49"),
        (51, {"pieces": [[]]}, "needs old ids"),
        (51, {"pieces": [[1]], "copy": [1]}, "not both"),
    ],
)
def test_what_does_not_fit_is_refused(size, more, message):
    with pytest.raises(HanlinError, match=message):
        resize_token_embeddings(make(tied=True), size, **more)
