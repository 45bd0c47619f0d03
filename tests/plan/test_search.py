"""The search: what it finds fits and can run, what it leaves out has a reason, and it is quick."""

from dataclasses import replace

import pytest

from hanlin.core.errors import HanlinError
from hanlin.parallel.settings import Layout
from hanlin.plan.closed import Job, closed_memory
from hanlin.plan.devices import parse_gpus
from hanlin.plan.known import known_config
from hanlin.plan.search import RESERVE, check_layout, describe_layout, search, why_not
from hanlin.plan.step_time import Assumptions, bubble_share, step_time


@pytest.fixture(scope="module")
def found():
    cluster = parse_gpus("64xH100")
    return search(Job.of(known_config("llama-3-70b"), 512, 4096), cluster), cluster


def test_what_is_found_fits_and_is_in_order(found):
    best, cluster = found[0].best, found[1]
    assert len(best) == 3
    for candidate in best:
        assert candidate.bytes <= cluster.device.memory - RESERVE
        assert candidate.layout.fitted(64) == candidate.layout
        assert why_not(candidate.job, candidate.layout, cluster) is None
    assert best[0].time.seconds <= 1.01 * min(c.time.seconds for c in best)


def test_every_variant_is_found_or_failed_for_a_reason(found):
    """Nothing is left out in silence: what failed is counted, by reason."""
    assert 0 < sum(found[0].failed.values()) < found[0].tried
    assert any("out of memory" in why for why in found[0].failed)


def test_what_cannot_fit_says_how_much_it_needs():
    result = search(Job.of(known_config("llama-3-70b"), 8, 4096), parse_gpus("2xA10"))
    assert not result.best and result.nearest is not None
    assert result.nearest.bytes > parse_gpus("2xA10").device.memory


@pytest.mark.parametrize(
    ("model", "fields", "why"),
    [
        ("llama-3-8b", {"tensor": 3}, "heads do not divide"),
        ("llama-3-8b", {"expert": 2, "data": 2}, "no experts"),
        ("llama-3-8b", {"pipeline": 64}, "more pipeline stages than layers"),
        ("deepseek-v3", {"pipeline": 2}, "predict ahead"),
        ("deepseek-v3", {"context": 2}, "predict ahead"),
        ("qwen3-30b-a3b", {"expert": 3, "data": 3}, "experts do not divide"),
    ],
)
def test_layouts_that_cannot_run_are_refused_by_name(model, fields, why):
    job = Job.of(known_config(model), 192, 4096)
    layout = Layout.model_validate(fields)
    layout = layout.fitted(layout.inner * (layout.data or 1))
    with pytest.raises(HanlinError, match=why):
        check_layout(job, layout, parse_gpus("8xH100", 8))


def test_a_bubble_is_p_minus_one_over_m():
    assert bubble_share(Layout(pipeline=4), 12) == pytest.approx(3 / 12)
    assert bubble_share(Layout(pipeline=4, schedule="interleaved", chunks=3), 12) == pytest.approx(1 / 12)
    assert bubble_share(Layout(pipeline=4, schedule="naive"), 12) == 3
    assert bubble_share(Layout(), 12) == 0


def test_a_perfect_machine_reaches_the_peak():
    """Without losses, traffic and links the MFU of one device is 1."""
    cluster = parse_gpus("1xH100")
    fast = replace(cluster.device, bandwidth=1e30)
    perfect = Assumptions(matmul=1.0, small=0.0, memory=1.0, latency=0.0)
    time = step_time(
        Job.of(known_config("qwen3-0.6b"), 8, 4096), Layout().fitted(1), replace(cluster, device=fast), perfect
    )
    assert time.mfu == pytest.approx(1.0, rel=1e-6)
    assert time.days(time.tokens_per_day) == pytest.approx(1.0)
    assert time.cost(time.tokens_per_day, 2.0) == pytest.approx(48.0)


def test_recompute_costs_a_forward_pass_and_saves_memory():
    cluster, layout = parse_gpus("1xH100"), Layout().fitted(1)
    none = Job.of(known_config("qwen3-0.6b"), 8, 4096)
    full = replace(none, recompute="full")
    assert step_time(full, layout, cluster).products == pytest.approx(step_time(none, layout, cluster).products * 4 / 3)
    assert closed_memory(full, layout)["activations"] < 0.2 * closed_memory(none, layout)["activations"]


def test_layouts_are_named_shortly():
    layout = Layout(tensor=8, sequence=True, pipeline=4, shard="zero1").fitted(64)
    assert describe_layout(layout) == "TP8+SP x PP4 (1f1b) x DP2 x zero1"
