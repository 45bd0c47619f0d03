"""Classic formulas give their papers' numbers, and closed forms of a rank add up to the model."""

import pytest

from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig
from hanlin.models.transformer import Transformer
from hanlin.parallel.settings import Layout
from hanlin.plan import formulas as f
from hanlin.plan.closed import NF4_BYTES, Job, closed_memory, frozen_bytes, in_flight, lora_numbers
from hanlin.plan.held import held_by
from hanlin.plan.known import KNOWN, known_config
from hanlin.plan.shares import Sizes
from hanlin.tune import add_lora

GPT3 = {"h": 12288, "a": 96, "s": 2048}


def gpt(depth: int, width: int, heads: int) -> ModelConfig:
    return ModelConfig.uniform(
        "gpt2", depth=depth, attention=AttentionConfig(heads, heads, width // heads, qkv_bias=True, output_bias=True),
        feed_forward=FeedForwardConfig(4 * width, bias=True, gated=False), vocab_size=50257, width=width,
        norm=NormConfig("layer"), tied_embeddings=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("llama-3-8b", 8.03e9, 8.03e9), ("llama-3-70b", 70.6e9, 70.6e9), ("qwen3-235b-a22b", 235.1e9, 22.2e9),
     ("qwen3-0.6b", 0.596e9, 0.596e9), ("deepseek-v3", 682.6e9, 38.2e9)],
)  # fmt: skip
def test_known_models_have_the_published_sizes(name, total, active):
    """DeepSeek-V3: 671.0B, of which 37.5B are active, and the module that predicts ahead, without its copies of
    embedding and head: 11.5B, of which 0.7B."""
    parameters = known_config(name).parameters()
    assert parameters.total == pytest.approx(total, rel=2e-3)
    assert parameters.active == pytest.approx(active, rel=2e-3)


def test_twelve_l_h_squared_is_gpt_but_for_vectors():
    """GPT-3 175B: 96 layers of 12,288 are 173.9B, and with the vocabulary within 0.1 % of all matrices."""
    config = gpt(96, GPT3["h"], GPT3["a"])
    assert f.parameters_12lh2(config, vocabulary=False) == pytest.approx(173.9e9, rel=1e-3)
    assert f.parameters_12lh2(config) == pytest.approx(config.parameters().total, rel=1e-3)


def test_model_states_are_sixteen_bytes_both_ways():
    for mixed in (True, False):
        assert f.model_state_bytes(7.5e9, mixed=mixed) == 120e9
    # ZeRO, figure 1: 7.5B over 64 devices
    stages = [f.model_state_bytes(7.5e9, shard=shard, replicas=64) / 1e9 for shard in ("zero1", "zero2", "zero3")]
    assert stages == pytest.approx([31.4, 16.6, 1.88], rel=5e-3)


def test_activations_of_gpt3_are_korthikantis():
    """Table 2 of arXiv:2205.05198 by hand: 34 + 5 a s / h = 114 for GPT-3 175B, and the parts of it under t = 8."""
    s, b, h, a = GPT3["s"], 1, GPT3["h"], GPT3["a"]
    unit = s * b * h
    assert f.layer_activations_gpt(s, b, h, a) == unit * 114
    assert f.layer_activations_gpt(s, b, h, a, tensor=8) == unit * (10 + 24 / 8 + 80 / 8)
    assert f.layer_activations_gpt(s, b, h, a, tensor=8, sequence=True) == unit * 114 / 8
    assert f.layer_activations_gpt(s, b, h, a, tensor=8, sequence=True, recompute="selective") == unit * 34 / 8
    assert f.layer_activations_gpt(s, b, h, a, recompute="full") == 2 * unit


def test_modern_activations_of_gpt_differ_by_what_flash_and_no_dropout_leave_out():
    """34 s b h less three dropout masks of s b h is 32 - 1 = 31; a stored log-sum-exp is 4 s b a."""
    config = gpt(1, 1024, 16)
    s, b, h, a = 512, 2, 1024, 16
    modern = f.layer_activations_modern(config, config.layers[0], s, b)
    assert modern == s * b * (2 * (2 * h + h + 4 * h + h + 8 * h) + 4 * a)
    assert modern == pytest.approx(32 * s * b * h + 4 * s * b * a)


@pytest.mark.parametrize("name", KNOWN)
def test_shares_of_all_ranks_are_the_model(name):
    """Over expert and pipeline ranks the numbers add up exactly; closed and exact counts agree."""
    config = known_config(name)
    ahead = bool(config.predict_ahead)
    experts = 4 if hasattr(config.layers[-1].feed_forward, "router") else 1
    layout = Layout(pipeline=1 if ahead else 4, data=4, expert=experts)
    sizes, total, exact = Sizes(config), 0.0, 0
    for place in range(layout.pipeline):
        share, held = sizes.share(layout, place), held_by(config, layout, pipeline=place)
        total += share.dense + share.experts * experts
        exact += held.rest + held.ahead * experts + sum(dense + own * experts for dense, own in held.layers.values())
    again = config.vocab_size * config.width if config.tied_embeddings and layout.pipeline > 1 else 0
    assert exact == config.parameters().total + again
    assert total == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_shares_hold_what_shard_leaves(tensor):
    """`held_by` against matrices cut by hand: heads and hidden units by T, norms whole."""
    config = known_config("qwen3-0.6b")
    held = held_by(config, Layout(tensor=tensor))
    h, q, kv, ff = 1024, 2048, 1024, 3072
    layer = (2 * h * q + 2 * h * kv + 3 * h * ff) // tensor + 2 * h + 2 * 128
    assert set(held.layers.values()) == {(layer, 0)}
    assert held.rest == 151936 * h // tensor + h


def test_lora_numbers_are_what_add_lora_adds():
    config = ModelConfig.uniform(
        "llama",
        depth=3,
        attention=AttentionConfig(4, 2, 8),
        feed_forward=FeedForwardConfig(48),
        vocab_size=61,
        width=32,
    )
    adapter = add_lora(Transformer(config), 4, 8.0, "all")
    assert sum(p.numel() for p in adapter.parameters()) == lora_numbers(Sizes(config), 4)


def test_qlora_holds_matrices_in_nf4():
    """Llama-3-8B: 6.98B numbers in matrices at 4.127 bits, embedding and head in 16 (arXiv:2305.14314)."""
    sizes = Sizes(known_config("llama-3-8b"))
    assert pytest.approx(4.127) == NF4_BYTES * 8
    assert frozen_bytes(sizes, "qlora") == pytest.approx(
        sizes.matrices * 4.127 / 8 + 2 * (sizes.total - sizes.matrices)
    )
    assert frozen_bytes(sizes, "qlora") / frozen_bytes(sizes, "lora") < 0.4


def test_zero_divides_what_it_says():
    job = Job.of(known_config("llama-3-8b"), 64, 1024)

    def states(shard: str) -> list[float]:
        found = closed_memory(job, Layout(shard=shard).fitted(8))
        return [found[name] / job.sizes.total for name in ("weights", "gradients", "optimiser")]

    assert states("zero1") == pytest.approx([4, 4, 1])
    assert states("zero2") == pytest.approx([4, 0.5, 1])
    assert states("zero3") == pytest.approx([0.5, 0.5, 1])


def test_schedules_keep_so_many_micro_batches():
    job = Job.of(known_config("llama-3-8b"), 16, 1024)
    for schedule, most in (("naive", 1), ("gpipe", 16), ("1f1b", 4)):
        assert in_flight(job, Layout(pipeline=4, schedule=schedule).fitted(4), 0) == most
    assert in_flight(job, Layout(pipeline=4).fitted(4), 3) == 1
