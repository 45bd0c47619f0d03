"""Rows shared by 2 and 4 processes train as in one, over a ring and by Ulysses; what cannot be shared is refused."""

import json
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tests.parallel.context_ranks import CASES, DENSE, LENGTH, MUTATIONS, PLAIN, ROWS, batch_of, compare, model_of

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.config import AlibiPosition, ExpertsConfig, LayerConfig, RelativeAttentionConfig
from hanlin.nn.masks import Causal, SameDocument, Window
from hanlin.nn.rope import Rope
from hanlin.nn.rope_scaling import DynamicNtk
from hanlin.nn.routing import RouterConfig
from hanlin.parallel.context import ContextParallel
from hanlin.parallel.ring import ring_plan, zigzag
from hanlin.parallel.ulysses import check_heads

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

KINDS = ("ring", "ulysses")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{ranks: what each rank found}."""
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["torch", "hanlin.train.trainer"])
    every = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"context-{ranks}")
        processes = [spawn.Process(target=compare, args=(rank, ranks, str(folder))) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode == 0
        every[ranks] = [json.loads((folder / str(rank)).read_text(encoding="utf-8")) for rank in range(ranks)]
    return every


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", (2, 4))
def test_five_steps_give_the_losses_and_weights_of_one_process(found, ranks, kind, case):
    """fp64, within 1e-10."""
    for mine in found[ranks]:
        assert mine[f"{kind}: {case}"] <= 1e-10


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen(found, mutation):
    assert max(mine[mutation] for mine in found[2]) > 1e-4


def test_a_group_may_be_a_part_of_all_processes(found):
    for mine in found[4]:
        assert mine["subgroup"] <= 1e-10


def test_ranks_that_share_rows_may_share_matrices_with_others(found):
    """Tensor x context, 2 x 2: loss and gradients of one process, fp64, within 1e-10."""
    for mine in found[4]:
        assert mine["tensor"] <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", (2, 4))
def test_in_bf16_the_gradient_is_as_near_to_the_true_one_as_in_one_process(found, ranks, kind):
    """Within a quarter of its error, plus 1e-3."""
    shared, alone = found[ranks][0]["bf16"][kind]
    assert 0 < alone < 0.1
    assert shared <= 1.25 * alone + 1e-3


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("b", (8, 2))
def test_the_bytes_that_a_layer_sends_are_those_of_the_formulas(found, ranks, b):
    t, wide = LENGTH // ranks, max(b, 4)
    K, H, D = PLAIN.kv_heads, PLAIN.heads, PLAIN.head_dim
    block = (ranks - 1) * ROWS * t * K * 2 * D
    swapped = ROWS * t * (H * D + max(K, ranks) * 2 * D + H * D) * b
    for mine in found[ranks]:
        sent = mine["bytes"]
        assert sent[f"ring forward {b}"] == {"send": block * b}
        assert sent[f"ring backward {b}"] == {"send": block * (b + wide)}
        assert sent[f"ulysses forward {b}"] == sent[f"ulysses backward {b}"] == {"all_to_all": swapped}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_batch_is_refused_unless_the_sharing_is_paused(found, kind):
    packed, plain, equal, shared_again = found[2][0]["whole"][kind]
    for said in (packed, plain):
        assert f"HanlinError: parallel.context: 2 ranks with {LENGTH} tokens of a row each" in said
    assert (equal, shared_again) == ("True", "True")


def test_under_a_causal_mask_every_rank_does_the_same_work_at_every_step():
    """Scores computed, in the row's chunks squared: 3 of 4 tiles at home, 2 of 4 of every other rank."""
    chunks = zigzag(64, 4)
    plans = [ring_plan(Causal(), chunks, rank, torch.device("cpu")) for rank in range(4)]
    assert [[len(pieces) for pieces in plan] for plan in plans] == [[3, 2, 2, 2]] * 4


def test_what_a_window_or_a_document_hides_is_not_computed():
    chunks = zigzag(64, 4)  # of 8 tokens
    narrow = ring_plan(Causal() & Window(8), chunks, 1, torch.device("cpu"))
    assert [len(pieces) for pieces in narrow] == [2, 1, 0, 1]  # 8 … 15 sees 0 …; 48 … 55 sees 40 … of rank 2
    own = SameDocument(torch.arange(64)[None] // 8)
    apart = ring_plan(Causal() & own, chunks, 1, torch.device("cpu"))
    assert [len(pieces) for pieces in apart] == [2, 0, 0, 0]


@pytest.fixture
def group(tmp_path):
    """This process alone as a group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield None
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_of_all_ranks_are_the_whole_row_once(group, kind):
    batch = batch_of(0, length=37)
    shares = []
    for rank in range(4):
        context = ContextParallel(group, kind)
        context.rank, context.ranks = rank, 4
        cut = context.cut(batch)
        length = cut.documents.shape[1]
        assert length == 40 and torch.equal(cut.documents[:, :37], batch.documents)
        assert (cut.documents[:, 37:] == -1).all()
        assert torch.equal(context.real(cut), cut.documents[:, context.index(length)] >= 0)
        shares.append((context.index(length), cut))
    order = torch.cat([index for index, _ in shares]).argsort()
    for name in ("ids", "targets", "positions"):
        whole = torch.cat([getattr(cut, name) for _, cut in shares], 1)[:, order]
        assert torch.equal(whole[:, :37], getattr(batch, name)), name


REFUSED = {
    "Alibi": (LayerConfig(replace(PLAIN, position=AlibiPosition()), DENSE), "Layer 0 .*AlibiPosition"),
    "dynamic": (
        LayerConfig(replace(PLAIN, position=Rope(scaling=DynamicNtk(factor=2.0))), DENSE),
        "Layer 0 .*DynamicNtk.* length of the whole document",
    ),
    "relative": (LayerConfig(RelativeAttentionConfig(4, 8), DENSE), "Layer 0 .*RelativeAttentionConfig"),
    "capacity": (LayerConfig(PLAIN, ExpertsConfig(4, 16, RouterConfig(2, capacity=3))), "Layer 0 .*limited number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_whole_rows_is_refused_by_name(group, name):
    layer, message = REFUSED[name]
    with pytest.raises(HanlinError, match=message):
        ContextParallel(group, "ring").attach(model_of(layer))


def test_a_batch_with_more_than_documents_is_refused(group):
    class Corrupted(Batch):
        pass

    batch = batch_of(0)
    with pytest.raises(HanlinError, match="Corrupted"):
        ContextParallel(group, "ring").cut(Corrupted(batch.ids, batch.targets, batch.positions, batch.documents))


def test_ulysses_names_the_heads_that_cannot_be_shared():
    check_heads(8, 2, 4)
    check_heads(8, 8, 4)
    for heads, kv_heads in ((6, 2), (12, 3), (8, 6)):
        with pytest.raises(HanlinError, match=f"{heads} query and {kv_heads} key heads for 4 ranks.*ring"):
            check_heads(heads, kv_heads, 4)
