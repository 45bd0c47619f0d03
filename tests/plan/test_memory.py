"""The planner's bytes against the allocator's, small: what a plan says is what a step takes.

Tolerance 3 %: below a few megabytes oneDNN's scratch, of which a plan knows a rule of thumb, is a visible share.
"""

import multiprocessing
from dataclasses import replace
from typing import Any

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
)
from hanlin.nn.routing import RouterConfig
from hanlin.parallel.settings import Layout
from hanlin.plan.fake import Fakes
from hanlin.plan.measure import measured_peak
from hanlin.plan.memory import step_memory
from hanlin.plan.work import Lora, Work
from hanlin.train.choices import SGD, Adafactor, AdamW, Muon, Recompute
from hanlin.tune.lora import LoraSettings

pytestmark = pytest.mark.xdist_group("memory")  # its processes share the cores

MOE = ExpertsConfig(4, 128, RouterConfig(2), shared_hidden=64)


def dense(depth: int = 2, **rest: Any) -> ModelConfig:
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 64, **rest.pop("attention", {})}
    feed_forward = rest.pop("feed_forward", FeedForwardConfig(512))
    return ModelConfig.uniform(
        "llama", depth=depth, attention=AttentionConfig(**attention), feed_forward=feed_forward, vocab_size=2048,
        width=256, **rest,
    )  # fmt: skip


LATENT = replace(
    dense(),
    layers=(LayerConfig(LatentAttentionConfig(4, 64, 32, 32, 32, q_rank=96), MOE),) * 2,
    predict_ahead=1,
)
STEPS: dict[str, tuple[ModelConfig, Work]] = {
    "fp32": (dense(), Work(2, 128, precision="fp32")),
    "bf16": (dense(), Work(4, 256)),
    "tied": (dense(tied_embeddings=True), Work(2, 128, precision="fp32")),
    "accumulation": (dense(), Work(1, 128, 4, precision="fp32")),
    "recompute": (dense(4), Work(2, 256, precision="fp32", recompute=Recompute(kind="full"))),
    "recompute every 2nd": (
        dense(4), Work(2, 256, precision="fp32", recompute=Recompute(kind="layers", every=2))),
    "recompute operators": (dense(4), Work(2, 256, precision="fp32", recompute=Recompute(kind="operators"))),
    "lora": (dense(), Work(2, 256, precision="fp32", lora=Lora(LoraSettings(4), "all"))),
    "lora, bf16 weights": (dense(), Work(2, 256, lora=Lora(LoraSettings(4, dropout=0.1), weights="bf16"))),
    "packed": (dense(), Work(2, 256, precision="fp32", documents=3)),
    "window": (dense(attention={"window": 32}), Work(2, 256, precision="fp32")),
    "long": (dense(), Work(1, 1024, precision="fp32")),
    "soft-cap": (dense(attention={"softcap": 50.0}, head=HeadConfig(softcap=30.0)), Work(2, 128, precision="fp32")),
    "experts": (dense(feed_forward=MOE), Work(2, 128, precision="fp32")),
    "experts, recompute": (
        dense(4, feed_forward=MOE), Work(2, 128, 2, precision="fp32", recompute=Recompute(kind="full"))),
    "latent, two tokens ahead": (LATENT, Work(2, 128, precision="fp32")),
    "muon": (dense(), Work(2, 128, precision="fp32", optimizer=Muon())),
    "adamw 8 bits": (dense(), Work(2, 128, precision="fp32", optimizer=AdamW(state_bits=8))),
    "adafactor": (dense(), Work(2, 128, precision="fp32", optimizer=Adafactor())),
    "sgd": (dense(), Work(2, 128, precision="fp32", optimizer=SGD())),
}  # fmt: skip


def measure(name: str, found: Any) -> None:
    """In a process of its own, one thread: the profiler counts what else a process holds."""
    torch.set_num_threads(1)
    found.put((name, measured_peak(*STEPS[name]).peak))


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=measure_all, args=(found,))
    process.start()
    peaks = dict(found.get(timeout=300) for _ in STEPS)
    process.join(60)
    return peaks


def measure_all(found: Any) -> None:
    for name in STEPS:
        measure(name, found)


@pytest.mark.parametrize("name", STEPS)
def test_predicted_peak_is_the_allocators(name: str, measured: dict[str, int]) -> None:
    predicted = step_memory(*STEPS[name], way="whole")
    assert predicted.peak == pytest.approx(measured[name], rel=0.03)


@pytest.mark.parametrize("name", [
    "bf16", "accumulation", "recompute", "recompute every 2nd", "lora", "packed", "experts, recompute",
    "latent, two tokens ahead", "muon",
])  # fmt: skip
def test_put_together_from_layers_is_the_whole(name: str) -> None:
    config, work = STEPS[name]
    config = replace(config, layers=config.layers[:1] * 5)
    whole, layers = (step_memory(config, work, way=way) for way in ("whole", "layers"))
    assert layers.peak == pytest.approx(whole.peak, rel=0.01)
    assert layers.phases["backward"] == pytest.approx(whole.phases["backward"], rel=0.01)


def test_two_kinds_of_layers_in_any_order() -> None:
    one, other = dense().layers[0], dense(feed_forward=MOE).layers[0]
    config = replace(dense(), layers=(one, other, other, one, one, other, one, one, one))
    work = Work(2, 128, 2, precision="fp32")
    whole, layers = (step_memory(config, work, way=way) for way in ("whole", "layers"))
    assert layers.peak == pytest.approx(whole.peak, rel=0.01)


def test_weights_gradients_and_state_are_exact() -> None:
    config, numbers = dense(), dense().parameters().total
    parts = step_memory(config, Work(2, 64, 2, precision="fp32")).parts
    assert parts["weights"] == parts["gradients"] == 4 * numbers
    assert 8 * numbers <= parts["optimiser"] <= 8 * numbers + 4 * 100  # and a count of steps for each tensor


def test_recompute_keeps_less_and_more_documents_keep_a_mask() -> None:
    config, work = dense(4), Work(2, 512, precision="fp32")
    plain = step_memory(config, work).parts["activations"]
    again = step_memory(config, replace(work, recompute=Recompute(kind="full"))).parts["activations"]
    packed = step_memory(config, replace(work, documents=4)).parts["activations"]
    assert again < plain / 2
    assert packed - plain >= 2 * 512 * 512 * 4  # a bias for each row


@pytest.mark.parametrize(
    ("layout", "category", "share"),
    [
        (Layout(data=4, shard="zero1"), "optimiser", 4),
        (Layout(data=4, shard="zero2"), "gradients", 4),
        (Layout(data=4, shard="zero3"), "weights", 4),
        (Layout(data=1, tensor=2), "weights", 2),
        (Layout(data=1, pipeline=2), "optimiser", 2),
    ],
)
def test_a_rank_holds_its_share(layout: Layout, category: str, share: int) -> None:
    config, work = dense(4), Work(1, 64, 4, precision="fp32")
    alone = step_memory(config, work, way="layers").parts[category]
    mine = step_memory(config, work, layout).parts[category]
    assert mine == pytest.approx(alone / share, rel=0.05)


def test_experts_are_divided_and_their_router_is_not() -> None:
    config, work = dense(feed_forward=MOE), Work(2, 128, precision="fp32")
    alone = step_memory(config, work, way="layers").parts["weights"]
    mine = step_memory(config, work, Layout(data=2, expert=2)).parts["weights"]
    experts = 2 * 4 * 3 * 256 * 128 * 4  # layers, experts, matrices, bytes
    assert alone - mine == experts // 2


def test_zero_divides_an_expert_by_those_who_hold_it() -> None:
    config, work = dense(feed_forward=MOE), Work(2, 128, precision="fp32")
    alone = step_memory(config, work, way="layers").parts["weights"]
    mine = step_memory(config, work, Layout(data=4, expert=2, shard="zero3")).parts["weights"]
    experts = 2 * 4 * 3 * 256 * 128 * 4
    assert mine == (alone - experts) // 4 + experts // 2 // 2


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("config", [dense(), LATENT], ids=["grouped", "latent"])
def test_a_gpu_never_writes_all_scores_down(config: ModelConfig, recompute: Any) -> None:
    """Twice the tokens take at most twice the bytes."""
    short, long = (
        step_memory(config, Work(1, n, recompute=Recompute(kind=recompute)), device="cuda").phases["backward"]
        for n in (2048, 4096)
    )
    assert long < 2 * short


def test_travelling_rows_and_shares_of_a_row() -> None:
    """4 layers of 2 chosen experts: a row that travels is kept twice; tensor ranks keep what norms read whole, unless
    sequence parallelism gives each its half: what is read by 2 norms a layer."""
    config, work = dense(4, feed_forward=MOE), Work(2, 128, precision="fp32")
    state = 2 * 128 * 256 * 4

    def kept(layout: Layout) -> int:
        return step_memory(config, work, layout).parts["activations"]

    assert kept(Layout(data=2, expert=2)) - kept(Layout(data=2, shard="zero1")) >= 4 * 2 * state
    whole, shared = kept(Layout(data=1, tensor=2)), kept(Layout(data=1, tensor=2, sequence=True))
    assert whole - shared == 4 * 2 * state // 2


def test_the_first_of_a_pipeline_keeps_the_most_micro_batches() -> None:
    config, work = dense(8), Work(1, 128, 8, precision="fp32")
    kept = [step_memory(config, work, Layout(data=1, pipeline=4), stage=s).parts["activations"] for s in range(4)]
    assert kept == sorted(kept, reverse=True) and kept[0] > 2 * kept[2]


@pytest.mark.parametrize("feed_forward", [FeedForwardConfig(512), MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_more_micro_batches_hold_no_more(recompute: Any, feed_forward: Any) -> None:
    """What a micro-batch adds is given back on every stage, whatever layer the short model frees it in: no category
    grows with their number, and none is negative."""
    config = dense(12, feed_forward=feed_forward)
    for layout, stages in ((Layout(data=2, shard="zero1"), 1), (Layout(data=1, pipeline=4), 4)):
        for stage in range(stages):
            few, many = (
                step_memory(config, Work(1, 64, n, recompute=Recompute(kind=recompute)), layout, stage=stage)
                for n in (8, 64)
            )
            assert few.parts == many.parts
            assert min(few.parts.values()) >= 0


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(HanlinError, match="4 experts cannot be shared equally by the 3 ranks"):
        step_memory(dense(feed_forward=MOE), Work(1, 64), Layout(data=3, expert=3))
    with pytest.raises(HanlinError, match="3 layers cannot be cut into 4 stages"):
        step_memory(dense(3), Work(1, 64, 4), Layout(data=1, pipeline=4))
    with pytest.raises(HanlinError, match="Stage 2 does not exist"):
        step_memory(dense(), Work(1, 64), Layout(data=1, pipeline=2), stage=2)
    with pytest.raises(HanlinError, match="`rows` of a step is 0"):
        Work(0, 64)


def test_a_plan_leaves_no_fake_numbers_behind() -> None:
    step_memory(dense(), Work(1, 64))
    step_memory(dense(), Work(1, 64), device="cuda")
    before = measured_peak(dense(), Work(1, 32, precision="fp32"), steps=1)  # the same tables, really
    assert before.peak > 0


def test_numbers_that_decide_are_real_and_those_that_weigh_are_fake() -> None:
    with Fakes() as fakes:
        targets = torch.tensor([1, -100, 2])
        weights = torch.ones(3)
        assert int((targets != -100).sum()) == 2
        assert weights[targets != -100].shape == (2,)
        held = fakes.ledger.total
        more = torch.zeros(1000)
        assert fakes.ledger.total - held == 4000
        del more
        assert fakes.ledger.total == held
