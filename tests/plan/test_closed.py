"""The closed form beside the run on fake tensors, and what it says of adapters, averages and recompute."""

from dataclasses import replace

import pytest

from hanlin.parallel.settings import Layout
from hanlin.plan.closed import Job, closed_memory
from hanlin.plan.devices import parse_gpus
from hanlin.plan.exact import exact_memory
from hanlin.plan.known import known_config
from hanlin.plan.search import fullest
from hanlin.plan.step_time import step_time
from hanlin.plan.volumes import volumes
from hanlin.train.choices import AdamW


@pytest.mark.parametrize(
    ("model", "world", "layout", "fields"),
    [
        ("qwen3-30b-a3b", 8, {"expert": 8, "shard": "zero3"}, {"recompute": "full", "micro_batch": 4}),
        ("qwen3-30b-a3b", 8, {"shard": "zero3"}, {"recompute": "none"}),
        ("llama-3-8b", 8, {"shard": "zero3"}, {"recompute": "selective", "micro_batch": 2}),
        ("llama-3-8b", 8, {"shard": "zero2", "tensor": 2, "sequence": True}, {"micro_batch": 4}),
        ("llama-3-8b", 8, {"shard": "zero3"}, {"method": "lora"}),
        ("qwen3-0.6b", 1, {}, {"recompute": "selective", "micro_batch": 8}),
        ("qwen3-0.6b", 1, {}, {"recompute": "full", "micro_batch": 8}),
        ("deepseek-v3", 64, {"expert": 64, "shard": "zero3"}, {"recompute": "full"}),
        ("deepseek-v3", 64, {"expert": 64, "shard": "zero3"}, {"method": "lora"}),
    ],
)
def test_closed_form_is_within_five_percent_of_the_run(model, world, layout, fields):
    job = Job.of(known_config(model), 8 if world == 1 else 2 * world * fields.get("micro_batch", 1), 4096, **fields)
    laid = Layout(**layout).fitted(world)
    run = exact_memory(job, laid, AdamW(), cuda=True)
    assert min(run.parts.values()) >= 0
    assert sum(fullest(job, laid).values()) == pytest.approx(run.peak, rel=0.05)


def test_zero3_gathers_frozen_weights():
    """For a forward and a backward of each micro-batch; two layers, embedding and head are whole at once."""
    job = Job.of(known_config("llama-3-8b"), 16, 4096, method="lora")
    layout = Layout(shard="zero3").fitted(8)
    frozen = 2.0 * (job.sizes.total - 2 * 128256 * 4096)
    assert volumes(job, layout)["replicas"].payload >= 2 * 2 * frozen
    assert closed_memory(job, layout)["buffers"] >= 0.99 * (2 * frozen / 32 + 2 * 2.0 * 128256 * 4096)
    nf4 = volumes(replace(job, method="qlora"), layout)["replicas"].payload
    assert nf4 < 0.4 * volumes(job, layout)["replicas"].payload


def test_a_frozen_head_has_no_gradient():
    job = Job.of(known_config("qwen3-0.6b"), 1, 4096)
    layout, head = Layout().fitted(1), 151936 * 1024
    full, lora = (closed_memory(replace(job, method=method), layout) for method in ("full", "lora"))
    assert full["loss"] >= 10 * head and lora["loss"] < 4 * head


def test_an_average_is_four_bytes_more():
    job, layout = Job.of(known_config("qwen3-0.6b"), 2, 4096), Layout().fitted(1)
    found = [closed_memory(replace(job, average=size), layout)["optimiser"] for size in (0.0, 4.0)]
    assert found[1] - found[0] == 4 * job.sizes.total
    run = [exact_memory(replace(job, average=size), layout, AdamW(), cuda=True).peak for size in (0.0, 4.0)]
    assert run[1] - run[0] == 4 * job.sizes.total


def test_kept_results_cost_traffic_and_no_products():
    job, layout, cluster = Job.of(known_config("qwen3-0.6b"), 8, 4096), Layout().fitted(1), parse_gpus("1xH100")
    none, kept, full = (
        step_time(replace(job, recompute=kind), layout, cluster) for kind in ("none", "selective", "full")
    )
    assert kept.products == none.products and none.traffic < kept.traffic < 1.3 * none.traffic
    assert none.seconds < kept.seconds < full.seconds
