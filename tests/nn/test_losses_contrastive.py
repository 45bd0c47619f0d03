"""Contrastive losses against torch's losses, loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from hanlin.core.errors import HanlinError
from hanlin.nn.contrastive import info_nce, margin_ranking, pair_margin, simcse, triplet


def vectors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def number(x):
    return x.detach().item()


def cosine(a, b):
    return number(a @ b / (a.norm() * b.norm()))


def by_hand(queries, keys, positives, temperature):
    total = 0.0
    for query, positive in zip(queries, positives, strict=True):
        weights = [math.exp(cosine(query, key) / temperature) for key in keys]
        total -= math.log(weights[positive] / sum(weights))
    return total


@pytest.mark.parametrize("keys", [4, 7])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_info_nce_is_the_equation(keys, temperature):
    q, k = vectors((4, 5), (keys, 5))
    assert abs(number(info_nce(q, k, temperature=temperature)) - by_hand(q, k, range(4), temperature)) <= 1e-10
    chosen = [3, 0, 0, 2]
    found = number(info_nce(q, k, temperature=temperature, positives=torch.tensor(chosen)))
    assert abs(found - by_hand(q, k, chosen, temperature)) <= 1e-10
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, temperature=temperature), (q, k))


def test_the_symmetric_form_is_half_of_both_directions():
    q, k = vectors((4, 5), (4, 5))
    expected = (by_hand(q, k, range(4), 0.2) + by_hand(k, q, range(4), 0.2)) / 2
    assert abs(number(info_nce(q, k, temperature=0.2, symmetric=True)) - expected) <= 1e-10


def test_a_learnt_temperature_gets_a_gradient():
    q, k = vectors((4, 5), (4, 5))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: info_nce(q.detach(), k.detach(), temperature=t), (temperature,))


def test_dot_products_are_cross_entropy_over_the_batch():
    q, k = vectors((4, 5), (4, 5))
    expected = F.cross_entropy(q @ k.T, torch.arange(4), reduction="sum")
    torch.testing.assert_close(info_nce(q, k, temperature=1.0, normalise=False), expected, rtol=0, atol=1e-10)


def test_simcse_with_and_without_contradictions():
    a, b, n = vectors((4, 5), (4, 5), (4, 5))
    torch.testing.assert_close(number(simcse(a, b)), by_hand(a, b, range(4), 0.05), rtol=1e-10, atol=0)
    expected = 0.0
    for i in range(4):  # equation 5
        below = sum(math.exp(cosine(a[i], b[j]) / 0.1) + math.exp(cosine(a[i], n[j]) / 0.1) for j in range(4))
        expected -= math.log(math.exp(cosine(a[i], b[i]) / 0.1) / below)
    assert abs(number(simcse(a, b, n, temperature=0.1)) - expected) <= 1e-10
    assert torch.autograd.gradcheck(lambda *x: simcse(*x, temperature=0.5), (a, b, n))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_triplet_is_that_of_torch(distance):
    a, p, n = vectors((6, 5), (6, 5), (6, 5))
    functions = {
        "euclidean": lambda x, y: (x - y).square().sum(-1).sqrt(),
        "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1),
    }
    expected = F.triplet_margin_with_distance_loss(
        a, p, n, distance_function=functions[distance], margin=0.3, reduction="sum"
    )
    found = triplet(a, p, n, margin=0.3, distance=distance)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *x: triplet(*x, margin=0.3, distance=distance), (a, p, n))


def test_equal_vectors_have_a_slope_of_zero_and_not_nan():
    a, n = vectors((2, 5), (2, 5))
    triplet(a, a, n, margin=9.0).backward()
    assert torch.isfinite(a.grad).all()


def test_pairs_are_pulled_together_and_pushed_out_to_the_margin():
    a, b = vectors((8, 3), (8, 3))
    same = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0])
    expected = 0.0
    for x, y, s in zip(a.detach(), b.detach(), same.tolist(), strict=True):
        d = float((x - y).norm())
        expected += d**2 if s else max(0.0, 2.5 - d) ** 2
    assert abs(number(pair_margin(a, b, same, margin=2.5)) - expected) <= 1e-10
    assert torch.autograd.gradcheck(lambda x, y: pair_margin(x, y, same, margin=2.5), (a, b))


def test_ranking_is_that_of_torch():
    better, worse = vectors((7,), (7,))
    expected = F.margin_ranking_loss(better, worse, torch.ones(7), margin=0.4, reduction="sum")
    torch.testing.assert_close(margin_ranking(better, worse, margin=0.4), expected, rtol=0, atol=1e-10)


def test_bf16_vectors_give_an_fp32_sum():
    q, k = (x.detach().bfloat16() for x in vectors((4, 5), (4, 5)))
    assert info_nce(q, k).dtype == triplet(q, k, k).dtype == margin_ranking(q, k).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    q, k = vectors((4, 5), (3, 5))
    cases = [
        (lambda: info_nce(q, k), "4 queries need at least 4 keys"),
        (lambda: info_nce(q, k, symmetric=True), "4 queries and 3 keys"),
        (lambda: info_nce(q, q, symmetric=True, positives=torch.arange(4)), "with `positives`"),
        (lambda: info_nce(q, q, temperature=0.0), "`temperature` is 0.0"),
        (lambda: info_nce(q, k, positives=torch.zeros(3, dtype=torch.int64)), "one key for each of the 4"),
        (lambda: info_nce(q, k[:, :4]), "vectors of one width"),
        (lambda: triplet(q, k, q), "`positive`"),
        (lambda: triplet(q, q, q, distance="manhattan"), "'manhattan'"),
        (lambda: pair_margin(q, q, torch.ones(3)), "each of the 4 pairs"),
        (lambda: margin_ranking(q, k), "must be pairs"),
    ]
    for call, message in cases:
        with pytest.raises(HanlinError, match=message):
            call()
