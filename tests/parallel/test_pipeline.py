"""A pipeline of 2 and of 4 processes trains as one process does, in every schedule; its messages are counted."""

import json
import multiprocessing

import pytest
import torch
from tests.parallel.pipeline_ranks import (
    CHANGED,
    COUNT,
    DENSE,
    DEPTH,
    LENGTH,
    MODELS,
    MUTATIONS,
    NUMBERS,
    ROWS,
    SCHEDULES,
    WIDTH,
    compare,
    model_of,
)

from hanlin.core.errors import HanlinError
from hanlin.models.config import (
    AttentionConfig,
    BucketPosition,
    FeedForwardConfig,
    HeadConfig,
    LayerConfig,
    ModelConfig,
    RelativeAttentionConfig,
)
from hanlin.models.transformer import Transformer
from hanlin.parallel.stages import cut_stages, rank_stages, sends, stage_layers
from hanlin.tune.lora import add_lora

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

PLACES = [(ranks, name) for ranks in (2, 4) for name in SCHEDULES if (ranks, name) != (4, "zero_bubble of 4")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{ranks: what each rank found}."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "hanlin.train.trainer"])
    every = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"pipeline-{ranks}")
        processes = [server.Process(target=compare, args=(rank, ranks, str(folder))) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
            if process.is_alive():
                process.kill()
            assert process.exitcode == 0
        every[ranks] = [json.loads((folder / str(rank)).read_text(encoding="utf-8")) for rank in range(ranks)]
    return every


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("ranks", "schedule"), PLACES)
def test_five_steps_give_the_losses_weights_and_expert_loads_of_one_process(found, ranks, schedule, kind):
    """fp64, 4 or 8 micro-batches: losses and weights within 1e-10, the routers' choices exactly."""
    for mine in found[ranks]:
        loss, weight, loads = mine[f"{kind}: {schedule}"]
        assert loss <= 1e-10
        assert weight <= 1e-10
        assert loads


@pytest.mark.parametrize("change", ("recomputed", "frozen"))
@pytest.mark.parametrize("schedule", CHANGED)
def test_recompute_and_frozen_layers_change_nothing(found, schedule, change):
    for mine in found[2]:
        loss, weight, _ = mine[f"{change}: {schedule}"]
        assert max(loss, weight) <= 1e-10


@pytest.mark.parametrize("schedule", ("1f1b", "interleaved"))
def test_a_pipeline_may_be_a_part_of_all_processes(found, schedule):
    for mine in found[4]:
        loss, weight, _ = mine[f"a part of all processes: {schedule}"]
        assert max(loss, weight) <= 1e-10


@pytest.mark.parametrize("count", NUMBERS)
@pytest.mark.parametrize("ranks", (2, 4))
def test_the_v_of_zero_bubble_takes_any_number_of_micro_batches(found, ranks, count):
    for mine in found[ranks]:
        loss, weight, _ = mine[f"{count} micro-batches"]
        assert max(loss, weight) <= 1e-10


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen(found, mutation):
    """1f1b, tied: far beyond the 1e-10 of the right one."""
    assert max(mine[mutation][1] for mine in found[2]) > 1e-5


@pytest.mark.parametrize(("ranks", "schedule"), PLACES)
def test_every_rank_sends_what_the_formula_says_from_the_first_step_on(found, ranks, schedule):
    """To the byte: states, gradients, the tied embedding's gradient, one number for the loss; bf16 states take 2."""
    for name in (f"payload: {schedule}", f"payload of bf16: {schedule}"):
        for mine in found[ranks]:
            assert mine[name]["found"] == [mine[name]["wanted"]] * 2
        stages = ranks * len(rank_stages(0, ranks, **SCHEDULES[schedule]))
        borders = stages - 1 - (schedule == "zero_bubble")  # there the last rank hands itself on
        state = ROWS * LENGTH * WIDTH * (2 if "bf16" in name else 8)
        assert sum(mine[name]["states"] for mine in found[ranks]) == 2 * borders * COUNT * state


@pytest.mark.parametrize(("ranks", "schedule"), PLACES)
def test_each_rank_holds_its_layers_alone_under_the_names_of_the_whole_model(found, ranks, schedule):
    held = [mine[f"held: {schedule}"] for mine in found[ranks]]
    everything = held[0]["everything"]
    layers = [number for rank in held for stage in rank["layers"] for number in stage]
    assert sorted(layers) == list(range(DEPTH))
    assert {name for rank in held for name in rank["names"]} == set(everything)
    tied = ["model.embed_tokens.weight"]
    twice = [name for name in everything if sum(name in rank["names"] for rank in held) > 1]
    apart = schedule != "zero_bubble"  # there the first rank has the last stage, too
    assert twice == (tied if apart else [])
    for rank, mine in enumerate(held):
        assert mine["elsewhere"] == (tied if apart and rank == ranks - 1 else [])
        assert mine["bytes"] == 8 * mine["numbers"]  # nothing of the other ranks' is kept alive
        assert mine["numbers"] <= mine["whole"] * (1 / ranks + 0.15)


@pytest.mark.parametrize(("ranks", "schedule"), PLACES)
def test_a_held_out_loss_is_known_on_every_rank(found, ranks, schedule):
    """Within 1e-10, for any number of micro-batches, and of several lengths."""
    for mine in found[ranks]:
        assert mine[f"evaluated: {schedule}"] <= 1e-10


def test_what_a_schedule_cannot_order_is_refused_by_its_numbers(found):
    for mine in found[4]:
        assert "found 4 of the shapes [(2, 12), (2, 7)]" in mine["refused"]["shapes"]
        assert "at least one; found 0" in mine["refused"]["none"]
        assert "found 1 for 4 ranks" in mine["refused"]["few"]
        assert "found 9 micro-batches in 2 rounds" in mine["refused"]["rounds"]
        assert "has gradients already" in mine["refused"]["twice"]
    assert [mine["refused"]["stage"] for mine in found[4]] == ["", "", "", "no such score"]


@pytest.mark.parametrize(
    ("depth", "stages", "wanted"),
    [
        (8, 4, [2, 2, 2, 2]),
        (8, 2, [4, 4]),
        (8, 3, [2, 3, 3]),
        (8, 8, [1] * 8),
        (9, 4, [2, 2, 3, 2]),
        (28, 4, [7, 7, 7, 7]),
        (30, 8, [3, 4, 4, 4, 4, 4, 4, 3]),
        (61, 16, [3, 3, *[4] * 13, 3]),
    ],
)
def test_layers_are_shared_out_by_cost(depth, stages, wanted):
    """Embedding and head count as a layer each."""
    cuts = stage_layers(ModelConfig("qwen3", 61, 32, (DENSE,) * depth), stages)
    assert [number for cut in cuts for number in cut] == list(range(depth))
    assert [len(cut) for cut in cuts] == wanted
    costs = [len(cut) + (stage in (0, stages - 1)) for stage, cut in enumerate(cuts)]
    assert max(costs) == -(-(depth + 2) // stages)


def test_an_encoder_without_a_head_has_one_end_only():
    config = ModelConfig("qwen3", 61, 32, (DENSE,) * 5, head=None)
    assert [len(cut) for cut in stage_layers(config, 2)] == [2, 3]


def test_stages_go_round_or_down_and_up():
    assert [rank_stages(rank, 4, "1f1b") for rank in range(4)] == [[0], [1], [2], [3]]
    assert [rank_stages(rank, 2, "interleaved", 3) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [rank_stages(rank, 4, "zero_bubble") for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [sends(rank, 4, "1f1b") for rank in range(4)] == [1, 2, 2, 1]
    assert [sends(rank, 4, "interleaved") for rank in range(4)] == [3, 4, 4, 3]
    assert [sends(rank, 4, "zero_bubble") for rank in range(4)] == [2, 4, 4, 2]


def test_a_part_of_a_model_cannot_be_called():
    model = model_of("dense")
    stage = cut_stages(model, 1, 4, "1f1b")[0]
    with pytest.raises(HanlinError, match="holds layers 2, 3 of 8 only"):
        model(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(HanlinError, match="cut into stages already"):
        cut_stages(model, 1, 4, "1f1b")
    with pytest.raises(HanlinError, match="holds layers 2, 3; found the index 0"):
        _ = model.model.layers[0]
    assert [layer.index for layer in model.model.layers] == list(stage.layers) == [2, 3]
    assert model.dtype == torch.float64


ENCODER = LayerConfig(AttentionConfig(4, 2, 8, bidirectional=True), FeedForwardConfig(40))
READS = LayerConfig(AttentionConfig(4, 2, 8), FeedForwardConfig(40), cross_attention=AttentionConfig(4, 4, 8))


@pytest.mark.parametrize(
    ("reason", "layers", "rest"),
    [
        ("an encoder and a decoder", (READS,) * 4, {"encoder": (ENCODER,)}),
        ("predict_ahead", (DENSE,) * 4, {"predict_ahead": 1}),
        ("two streams", (LayerConfig(RelativeAttentionConfig(4, 8), FeedForwardConfig(40), norms="post"),) * 4, {}),
        (
            "table of position buckets",
            (LayerConfig(AttentionConfig(4, 4, 8, position=BucketPosition(8, 16)), FeedForwardConfig(40)),) * 4,
            {},
        ),
        ("3 layers cannot be cut into 4 stages", (DENSE,) * 3, {}),
    ],
)
def test_models_that_are_no_row_of_layers_are_refused(reason, layers, rest):
    with pytest.raises(HanlinError, match=reason):
        cut_stages(Transformer(ModelConfig("qwen3", 61, 32, layers, **rest)), 0, 4, "1f1b")


def test_an_adapter_is_refused():
    """It holds on to all layers, also to those of other ranks."""
    model = model_of("dense")
    add_lora(model, 2)
    with pytest.raises(HanlinError, match="the model has an adapter"):
        cut_stages(model, 0, 2, "gpipe")


def test_stages_that_a_schedule_cannot_take_are_refused():
    with pytest.raises(HanlinError, match="gpipe takes one stage a rank; found chunks 2"):
        rank_stages(0, 2, "gpipe", 2)
    with pytest.raises(HanlinError, match="interleaved needs 2 stages a rank or more"):
        rank_stages(0, 2, "interleaved", 1)
    with pytest.raises(HanlinError, match="8 layers cannot be cut into 12 stages"):
        cut_stages(model_of("dense"), 0, 4, "interleaved", 3)
    with pytest.raises(HanlinError, match="2 ranks or more, found 1"):
        cut_stages(model_of("dense"), 0, 1, "gpipe")


def test_the_last_stage_holds_the_norm_and_the_head():
    model = Transformer(ModelConfig("qwen3", 61, 32, (DENSE,) * 2, head=HeadConfig(bias=True)))
    cut_stages(model, 1, 2, "gpipe")
    assert {"lm_head.weight", "lm_head.bias", "model.norm.weight"} <= dict(model.named_parameters()).keys()
    assert not hasattr(model.model, "embed_tokens")
