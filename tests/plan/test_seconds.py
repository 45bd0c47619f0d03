"""The arithmetic of predicted seconds, on rates that are written here; nothing is timed."""

import pytest

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from hanlin.nn.routing import RouterConfig
from hanlin.plan.calibrate import fastest_of
from hanlin.plan.seconds import Rates, price, step_seconds
from hanlin.plan.trace import Trace, key_flops, trace_step
from hanlin.plan.work import Work
from hanlin.train.choices import Recompute

FLAT = Rates(
    products={(f"mm {kind}", "fp32"): [((64, 64, 64), 1e9), ((1024, 1024, 1024), 1e9)] for kind in ("nn", "nt", "tn")},
    passes={("pointwise", "fp32"): [(0, 0.0), (1000, 1e-6)]},
    attention={(f"attention{kind}", "fp32"): [((64, 64), 1e9)] for kind in ("", " back", " torch", " torch back")},
    overhead=1e-5,
)


def model(**rest: object) -> ModelConfig:
    chosen = {"feed_forward": FeedForwardConfig(128), **rest}
    return ModelConfig.uniform("llama", depth=2, attention=AttentionConfig(2, 2, 32), vocab_size=96, width=64, **chosen)


def test_products_passes_and_calls_add_up() -> None:
    done = Trace({("mm nt", "fp32", (64, 64, 64)): 3, ("pointwise", "fp32", (2500,)): 2}, calls=7)
    seconds = price(done, FLAT)
    assert seconds.parts == pytest.approx({"mm nt": 3 * 2 * 64**3 / 1e9, "pointwise": 2 * 2.5e-6, "overhead": 7e-5})
    assert seconds.total == pytest.approx(sum(seconds.parts.values()))
    assert seconds.flops == 3 * 2 * 64**3


def test_a_shape_between_two_has_a_rate_between_theirs() -> None:
    rates = Rates({("mm nn", "fp32"): [((64, 64, 64), 1e9), ((1024, 1024, 1024), 4e9)]}, {}, {}, 0.0)

    def rate(size: int) -> float:
        key = ("mm nn", "fp32", (size, size, size))
        return 2.0 * size**3 / rates.seconds(key)

    assert rate(256) == pytest.approx(2e9, rel=1e-6)  # as many doublings from both
    assert rate(64) == pytest.approx(1e9, rel=0.01)
    assert rate(8192) == pytest.approx(4e9, rel=0.01)  # past the border: the border's
    assert 1e9 < rate(128) < rate(256) < rate(512) < 4e9


def test_operations_within_a_step_take_longer_than_alone() -> None:
    slow = Rates(FLAT.products, FLAT.passes, FLAT.attention, 0.0, {"fp32": 1.5})
    key = ("pointwise", "fp32", (1000,))
    assert slow.seconds(key) == pytest.approx(1.5 * FLAT.seconds(key))


def test_a_kind_that_was_not_measured_is_refused_only_if_nothing_stands_for_it() -> None:
    assert FLAT.seconds(("sort", "bf16", (1000,))) == pytest.approx(1e-6)  # as a pass of fp32
    with pytest.raises(HanlinError, match="know no sort"):
        Rates({}, {}, {}, 0.0).seconds(("sort", "fp32", (1000,)))


def test_the_fastest_of_two_measurements_counts() -> None:
    late = Rates(
        {k: [(at, v / 2) for at, v in row] for k, row in FLAT.products.items()}, FLAT.passes, FLAT.attention, 2e-5
    )
    assert fastest_of([late, FLAT]).products == FLAT.products
    assert fastest_of([late, FLAT]).overhead == 1e-5


def test_a_trace_counts_every_product_of_the_step() -> None:
    """6 N D for the matrices and the head, and attention over the pairs a causal mask shows; exactly."""
    config, work = model(), Work(2, 32, precision="fp32")
    done = trace_step(config, work)
    tokens, trained = 2 * 32, 2 * 31
    layers = sum(p for part, p in config.parameters().parts.items() if part in ("attention", "feed-forward"))
    products = sum(n * key_flops(key) for key, n in done.counts.items() if key[0].startswith("mm"))
    attention = sum(n * key_flops(key) for key, n in done.counts.items() if key[0].startswith("attention"))
    assert products == 6 * layers * tokens + 6 * 96 * 64 * trained
    assert attention in (0, 2 * 14 * 2 * 2 * (32 * 33 // 2) * 32)  # where Hanlin's kernel runs: 2 layers, rows, heads


@pytest.mark.parametrize("feed_forward", [FeedForwardConfig(128), ExpertsConfig(4, 64, RouterConfig(2))])
def test_work_grows_with_micro_batches_and_recompute(feed_forward: object) -> None:
    config = model(feed_forward=feed_forward)
    one = step_seconds(config, Work(1, 32, precision="fp32"), FLAT)
    two = step_seconds(config, Work(1, 32, 2, precision="fp32"), FLAT)
    again = step_seconds(config, Work(1, 32, precision="fp32", recompute=Recompute(kind="full")), FLAT)
    assert two.flops == pytest.approx(2 * one.flops)
    assert one.flops < again.flops < 4 / 3 * one.flops
    assert one.total < again.total < two.total
