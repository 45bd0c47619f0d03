"""The seams that every later method grows behind: denominators, batch order, cache = no cache."""

from dataclasses import replace

import pytest
import torch

from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.data.order import BLOCK, mixed, shuffled
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import IGNORE
from hanlin.train.objective import CausalLM, step_loss


def tiny(**attention) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "llama",
        depth=2,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, **attention),
        feed_forward=FeedForwardConfig(48),
        vocab_size=61,
        width=32,
    )
    model = Transformer(config).double()
    for parameter in model.parameters():  # a model at its initialisation hides a forgotten weight
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def packed(*lengths_by_row: list[int], width: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(1)
    documents = torch.full((len(lengths_by_row), width), -1)
    for row, lengths in enumerate(lengths_by_row):
        start = 0
        for number, length in enumerate(lengths):
            documents[row, start : start + length] = number
            start += length
    ids = torch.randint(0, 61, documents.shape, generator=generator)
    return Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)


def gradients(model: Transformer, parts: list[Batch]) -> list[torch.Tensor]:
    objective, totals = CausalLM(), {"tokens": 0.0}
    for part in parts:
        totals["tokens"] += objective.count(part)["tokens"]
    model.zero_grad()
    for part in parts:
        step_loss(objective.loss(model, part)[0], totals).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_accumulated_gradients_equal_the_whole_batch_whatever_the_documents_lengths():
    model = tiny()
    batch = packed([24], [3, 5], [10, 14], [2])
    whole = gradients(model, [batch])
    split = gradients(model, [batch.rows(i, i + 1) for i in range(4)])
    for a, b in zip(whole, split, strict=True):
        assert (a - b).norm() <= 1e-12 * a.norm()


def test_packed_loss_equals_the_documents_alone():
    model = tiny(window=4)
    batch = packed([7, 9, 8], [5, 19])
    together = CausalLM().loss(model, batch)[0][0][0]
    alone = 0.0
    for row in range(2):
        for number in range(int(batch.documents[row].max()) + 1):
            ids = batch.ids[row][batch.documents[row] == number][None]
            zeros = torch.zeros_like(ids)
            part = Batch(ids, next_token_targets(ids, zeros), document_positions(zeros), zeros)
            alone += CausalLM().loss(model, part)[0][0][0]
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_a_step_without_any_trained_token_has_zero_loss_and_zero_gradient():
    model = tiny()
    batch = packed([1, 1])
    assert CausalLM().count(batch) == {"tokens": 0.0}
    assert all((g == 0).all() for g in gradients(model, [batch]))


def test_targets_never_cross_a_border():
    batch = packed([3, 2], width=7)
    assert (batch.targets[0] == IGNORE).tolist() == [False, False, True, False, True, True, True]
    assert batch.positions[0, :5].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("count", [1, 7, 100])
def test_every_epoch_shows_each_sample_once(count):
    for epoch in range(3):
        seen = [shuffled(epoch * count + i, count, seed=5) for i in range(count)]
        assert sorted(seen) == list(range(count))


def test_a_mixture_keeps_its_weights_and_counts_each_source_without_gaps():
    weights = [0.5, 0.3, 0.2]
    drawn = [mixed(g, weights, seed=9) for g in range(3 * BLOCK)]
    for source, weight in enumerate(weights):
        counters = sorted(before for s, before in drawn if s == source)
        assert counters == list(range(len(counters)))
        assert abs(len(counters) - weight * 3 * BLOCK) <= 1


def test_order_does_not_depend_on_who_asks():
    forwards = [shuffled(g, 50, seed=3) for g in range(200)]
    assert [shuffled(g, 50, seed=3) for g in reversed(range(200))] == forwards[::-1]


def test_tokens_further_ahead_join_the_loss():
    """Two further tokens: each the mean over its own targets, weighted; borders of documents are respected."""
    torch.manual_seed(0)
    model = Transformer(replace(tiny().config, predict_ahead=2)).double()
    ids = torch.randint(0, 61, (2, 12))
    documents = torch.tensor([[0] * 12, [0] * 5 + [1] * 7])
    batch = Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)
    objective = CausalLM(ahead=2, ahead_weight=0.5)
    totals = objective.count(batch)
    assert totals == {"tokens": 11 + 10, "tokens_1": 10 + 8, "tokens_2": 9 + 6}
    terms, metrics = objective.loss(model, batch)
    expected = metrics["loss"][0] / 21 + 0.25 * (metrics["loss_1_ahead"][0] / 18 + metrics["loss_2_ahead"][0] / 15)
    assert step_loss(terms, totals).item() == pytest.approx(expected, rel=1e-12)
    step_loss(terms, totals).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.ahead.parameters())
