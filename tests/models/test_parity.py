"""Logits equal those of transformers to 2e-5 in fp32, their weights here and our weights there."""

import pytest
import torch
from tests.models.oracle import CONFIGS, load_theirs, logits_of, make_oracle, redraw, save_theirs, some_ids

from hanlin.models import load_model, save_model
from hanlin.models.transformer import Transformer
from hanlin.nn.masks import Causal, SameDocument

TOLERANCE = 2e-5


@pytest.fixture(params=CONFIGS)
def oracle(request):
    return make_oracle(request.param)


def difference(ours: Transformer, theirs: torch.nn.Module, ids: torch.Tensor) -> float:
    return float((logits_of(ours, ids) - logits_of(theirs, ids)).abs().max())


def test_their_model_gives_the_same_logits_here(oracle, tmp_path):
    ours = load_model(save_theirs(oracle, tmp_path))
    assert not ours.training
    assert difference(ours, oracle, some_ids()) <= TOLERANCE
    assert difference(ours, oracle, some_ids(1, 1)) <= TOLERANCE


def test_our_model_gives_the_same_logits_there(oracle, tmp_path):
    ours = load_model(save_theirs(oracle, tmp_path / "theirs"))
    torch.manual_seed(8)
    redraw(ours)
    save_model(ours, tmp_path / "ours")
    theirs = load_theirs(tmp_path / "ours")
    assert logits_of(theirs, some_ids()).std() >= 0.5
    assert difference(ours, theirs, some_ids()) <= TOLERANCE


@torch.no_grad()
def test_padded_rows_give_the_same_logits_where_there_is_text(oracle, tmp_path):
    ours = load_model(save_theirs(oracle, tmp_path))
    ids = some_ids(3, 17)
    padding = torch.tensor([0, 4, 11])[:, None]  # on the left, as for generation
    place = torch.arange(17)[None] - padding
    real = place >= 0
    positions = place.clamp_min(0)
    theirs = oracle(ids, attention_mask=real.long(), position_ids=positions).logits
    mask = Causal() & SameDocument(torch.where(real, 0, -1))
    got = ours(ids, positions=positions, mask=mask).logits
    assert (got - theirs)[real].abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_row_of_two_documents_gives_each_documents_own_logits(oracle, tmp_path):
    ours = load_model(save_theirs(oracle, tmp_path))
    a, b = some_ids(1, 9), some_ids(1, 12)
    documents = torch.tensor([[0] * 9 + [1] * 12])
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    got = ours(torch.cat([a, b], 1), positions=positions, mask=Causal() & SameDocument(documents)).logits
    assert (got[:, :9] - oracle(a).logits).abs().max() <= TOLERANCE
    assert (got[:, 9:] - oracle(b).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3-tied", "mistral"])
def test_gradients_equal_theirs(name, tmp_path):
    theirs = make_oracle(name)
    ours = load_model(save_theirs(theirs, tmp_path))
    ids = some_ids()
    for model in (ours, theirs):
        logits = model(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    assert {n for n, _ in ours.named_parameters()} == expected.keys()
    for key, parameter in ours.named_parameters():
        gap = (parameter.grad - expected[key].grad).norm()
        assert gap <= 1e-5 * expected[key].grad.norm(), key


def test_both_generate_the_same_64_tokens(tmp_path):
    theirs = make_oracle("qwen3", max_position_embeddings=128)
    ours = load_model(save_theirs(theirs, tmp_path))
    ids = some_ids(1, 5)
    with torch.no_grad():
        expected = theirs.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
        for _ in range(64):
            ids = torch.cat([ids, ours(ids, logits="last").logits.argmax(-1)], 1)
    assert ids.tolist() == expected.tolist()
