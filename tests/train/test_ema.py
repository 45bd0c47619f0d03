"""The average of the weights against its closed form, in whole parameters and in pieces."""

import pytest
import torch
from tiny_training import tiny_model

from hanlin.core.errors import HanlinError
from hanlin.train.ema import EMA


def walk(model, steps, after=lambda: None):
    """Random steps; returns the weights after each, the first ones in front."""
    generator = torch.Generator().manual_seed(0)
    seen = [[p.detach().clone() for p in model.parameters()]]
    for _ in range(steps):
        for p in model.parameters():
            p.data.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        after()
        seen.append([p.detach().clone() for p in model.parameters()])
    return seen


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(warmup):
    """sum over n of (1 - d_n) * product of later d * w_n, in fp64: 1e-12."""
    model = tiny_model().double()
    ema = EMA(dict(model.named_parameters()), 0.9, warmup=warmup)
    seen = walk(model, 25, ema.update)
    decays = [min(0.9, (1 + n) / (10 + n)) if warmup else 0.9 for n in range(25)]
    shares = [1.0, *(1 - d for d in decays)]
    for n, d in enumerate(decays):
        for earlier in range(n + 1):
            shares[earlier] *= d
    assert abs(sum(shares) - 1) < 1e-12
    for index, average in enumerate(ema.averages.values()):
        expected = sum(share * weights[index] for share, weights in zip(shares, seen, strict=True))
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-12)


def test_pieces_have_the_averages_of_the_whole():
    model = tiny_model()
    whole = EMA(dict(model.named_parameters()), 0.99)
    pieces = {n: p.data.view(-1)[: p.numel() // 2] for n, p in model.named_parameters()}  # share memory
    half = EMA(pieces, 0.99)

    def update():
        whole.update()
        half.update()

    walk(model, 5, update)
    for name, average in half.averages.items():
        assert torch.equal(average, whole.averages[name].view(-1)[: average.numel()])


def test_a_swap_is_undone_bit_for_bit_also_after_an_error():
    model, ids = tiny_model(), torch.arange(12)[None]
    ema = EMA(dict(model.named_parameters()), 0.5)
    walk(model, 3, ema.update)
    before, places = model(ids).logits, [p.data_ptr() for p in model.parameters()]
    averaged = tiny_model()
    averaged.load_state_dict(ema.averages)
    with pytest.raises(KeyError), ema.swapped():
        assert torch.equal(model(ids).logits, averaged(ids).logits)  # also in the fused buffers
        raise KeyError
    assert torch.equal(model(ids).logits, before)
    assert places == [p.data_ptr() for p in model.parameters()]


def test_a_loaded_average_goes_on_the_same():
    one, other = tiny_model(), tiny_model(seed=3)
    a, b = EMA(dict(one.named_parameters()), 0.9), EMA(dict(other.named_parameters()), 0.9)
    walk(one, 4, a.update)
    b.load({name: t.clone() for name, t in a.state().items()})
    other.load_state_dict(one.state_dict())
    a.update(), b.update()
    assert a.updates == b.updates == 5
    assert all(torch.equal(a.averages[n], b.averages[n]) for n in a.averages)


def test_half_precision_weights_are_averaged_in_fp32():
    """Changes of 1e-3 on 1: in bf16 each would be lost."""
    weight = torch.ones(4, dtype=torch.bfloat16)
    ema = EMA({"w": weight}, 0.999, warmup=False)
    weight.fill_(2.0)
    ema.update()
    torch.testing.assert_close(ema.averages["w"], torch.full((4,), 1.001))


def test_another_models_average_is_refused():
    ema = EMA({"w": torch.ones(2)}, 0.9)
    with pytest.raises(HanlinError, match="'v', 'w'"):
        ema.load({"v": torch.ones(2), "updates": torch.tensor(1)})
    with pytest.raises(HanlinError, match=r"w is \[3\]"):
        ema.load({"w": torch.ones(3), "updates": torch.tensor(1)})
    with pytest.raises(HanlinError, match="between 0 and 1"):
        EMA({}, 1.0)
