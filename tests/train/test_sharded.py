"""Checkpoints that several processes wrote in parts, read in any other layout: equal bit for bit."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.models.tensor_plan import Cut, share
from hanlin.parallel.tensor import cut_tensor
from hanlin.train.checkpoint import finish_parts, part_file, shared_folder, write_checkpoint, write_part
from hanlin.train.reader import DamagedCheckpointError, export_weights, open_checkpoint
from hanlin.train.sharded import Held, Share, assign, join, local_shape, take

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def numbers(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, tuple(shape), generator=generator).to(dtype)


def pieces_of(name, whole, draw, world):
    """Of every rank its `Held`, in a layout drawn at random: tensor ranks x (experts x) replicas that share or copy."""
    tensor = draw.choice([t for t in (1, 2, 4) if world % t == 0])
    replicas = world // tensor
    cuts_of = [()] * tensor
    if tensor > 1 and whole.ndim and draw.random() < 0.8:
        dim, pieces = draw.randrange(whole.ndim), draw.choice((1, 2))
        rows = whole.shape[dim] // pieces
        units = draw.choice([u for u in (1, 2, 3, 4, 8) if rows and rows % u == 0] or [0])
        if units and whole.shape[dim] % pieces == 0:
            cuts_of = [(Share(dim, pieces, units, *share(units, rank, tensor)),) for rank in range(tensor)]
    zero, experts = draw.random() < 0.6, draw.random() < 0.5
    held = []
    for rank in range(world):
        cuts, replica = cuts_of[rank % tensor], rank // tensor
        other = [d for d in range(whole.ndim) if d not in {c.dim for c in cuts}]
        if experts and other and whole.shape[other[0]] % replicas == 0 and replicas > 1:
            cuts = (*cuts, Share(other[0], 1, replicas, replica, replica + 1))
            held.append(Held(name, take(whole, cuts), tuple(whole.shape), cuts))
        elif zero and whole.ndim:
            count = take(whole, cuts).numel()
            span = (replica * count // replicas, (replica + 1) * count // replicas)
            held.append(Held(name, take(whole, cuts, span), tuple(whole.shape), cuts, span))
        else:
            held.append(Held(name, take(whole, cuts), tuple(whole.shape), cuts))
    return held


def write(folder, ranks, state=b'{"step": 7}'):
    """What the processes of a run do, one after another in this one."""
    places = [[held.place for held in mine] for mine in ranks]
    writers = assign(places)
    shared_folder(folder).mkdir(parents=True)
    for rank, mine in enumerate(ranks):
        write_part(folder, rank, {mine[number].name: mine[number].tensor for number in writers[rank]})
    finish_parts(folder, 7, state, [[places[r][n] for n in numbers] for r, numbers in enumerate(writers)])
    return open_checkpoint(folder)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_written_on_any_number_of_ranks_and_read_on_any_other(tmp_path_factory, seed):
    draw = random.Random(seed)
    shapes = [(), (1,), (7,), (8, 6), (12, 4), (4, 16, 3), (0, 3), (24,)]
    tensors = {
        f"weights/t{i}": numbers(draw.choice(shapes), draw.choice(DTYPES), seed + i) for i in range(draw.randint(1, 6))
    }
    world = draw.choice((2, 3, 4, 8))
    laid = [pieces_of(name, whole, draw, world) for name, whole in tensors.items()]
    reader = write(tmp_path_factory.mktemp("c") / "step-7", [list(mine) for mine in zip(*laid, strict=True)])
    assert (reader.step, reader.world, set(reader.names())) == (7, world, set(tensors))
    for name, whole in tensors.items():
        assert reader.dtype(name) == whole.dtype and torch.equal(reader.whole(name), whole)
        for world in (1, 2, 4, 8):
            for wanted in pieces_of(name, whole, draw, world):
                target = Held(name, torch.empty_like(wanted.tensor), wanted.shape, wanted.cuts, wanted.span)
                reader.put(target)
                assert torch.equal(target.tensor, wanted.tensor)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_a_share_is_what_tensor_parallelism_takes(seed):
    draw = random.Random(seed)
    dim, pieces, units, ranks = draw.randrange(3), draw.choice((1, 2, 3)), draw.randint(1, 6), draw.choice((1, 2, 4))
    shape = [draw.randint(1, 4) for _ in range(3)]
    shape[dim] = pieces * units * draw.randint(1, 3)
    whole = numbers(shape, seed=seed)
    for rank in range(ranks):
        cut = Share(dim, pieces, units, *share(units, rank, ranks))
        theirs = cut_tensor(whole, Cut("heads", dim, pieces), units, rank, ranks)
        assert torch.equal(take(whole, [cut]), theirs)
        assert local_shape(tuple(shape), [cut]) == tuple(theirs.shape)


def test_each_piece_is_written_once_and_the_work_is_spread():
    """Four ranks with equal copies of eight tensors: two each."""
    copies = [Held(f"weights/{i}", torch.zeros(10), (10,)).place for i in range(8)]
    assert [len(numbers) for numbers in assign([copies] * 4)] == [2, 2, 2, 2]


def test_ranks_that_share_a_key_head_write_it_once():
    """Two key heads on four ranks: ranks 0 and 1 hold the same one."""
    whole = numbers((4, 3))
    cuts = [(Share(0, 1, 2, *share(2, rank, 4)),) for rank in range(4)]
    places = [[Held("weights/k", take(whole, cut), (4, 3), cut).place] for cut in cuts]
    assert [len(numbers) for numbers in assign(places)] == [1, 0, 1, 0]


def test_a_tensor_with_a_gap_is_not_written():
    whole = numbers((4, 6))
    upper = Held("weights/w", whole[:2], (4, 6), (Share(0, 1, 2, 0, 1),)).place
    with pytest.raises(HanlinError, match="weights/w: the ranks hold 12 different numbers of 24"):
        assign([[upper], [upper]])
    first = Held("weights/w", whole.reshape(-1)[:9], (4, 6), (), (0, 9)).place
    last = Held("weights/w", whole.reshape(-1)[10:], (4, 6), (), (10, 24)).place
    with pytest.raises(HanlinError, match="no rank holds the numbers 9 to 10"):
        assign([[first], [last]])
    with pytest.raises(HanlinError, match=r"do not agree what weights/w is: .*\[4, 6\] or .*\[6, 4\]"):
        assign([[Held("weights/w", whole, (4, 6)).place], [Held("weights/w", whole.T, (6, 4)).place]])
    with pytest.raises(ValueError, match="is not the piece"):
        Held("weights/w", whole[:1], (4, 6), (Share(0, 1, 2, 0, 1),))


def two_ranks(folder):
    whole = numbers((8, 4))
    ranks = [
        [
            Held("weights/w", take(whole, (cut,)), (8, 4), (cut,)),
            Held("optimizer/w/exp_avg", take(whole + 1, (cut,)), (8, 4), (cut,)),
            Held("optimizer/w/step", torch.tensor(3.0), ()),
        ]
        for cut in (Share(0, 2, 2, rank, rank + 1) for rank in range(2))
    ]
    return whole, write(folder, ranks)


def test_the_folder_holds_a_file_a_rank_and_what_makes_them_whole(tmp_path):
    whole, reader = two_ranks(tmp_path / "step-7")
    assert sorted(f.name for f in reader.folder.iterdir()) == [
        "manifest.json", "rank-0.safetensors", "rank-1.safetensors", "state.json",
    ]  # fmt: skip
    manifest = json.loads((reader.folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["world"]) == (2, 2)
    assert manifest["tensors"]["weights/w"] == {
        "dtype": "F32",
        "shape": [8, 4],
        "pieces": [
            {"file": f"rank-{rank}.safetensors", "key": "weights/w", "cuts": [[0, 2, 2, rank, rank + 1]]}
            for rank in range(2)
        ],
    }
    assert torch.equal(reader.whole("optimizer/w/exp_avg"), whole + 1) and reader.whole("optimizer/w/step") == 3.0
    assert list(export_weights(reader)) == ["w"] and torch.equal(export_weights(reader)["w"], whole)


def test_whole_files_are_read_by_the_same_reader(tmp_path):
    w, average = torch.randn(3, 2), torch.randn(3, 2)
    tensors = {
        "weights/w": w, "optimizer/w/exp_avg": w + 1, "average/w": average, "random/cpu": torch.get_rng_state(),
    }  # fmt: skip
    write_checkpoint(tmp_path / "step-7", 7, b'{"step": 7}', tensors)
    reader = open_checkpoint(tmp_path / "step-7")
    assert {name: reader.whole(name).tolist() for name in reader.names()} == {n: t.tolist() for n, t in tensors.items()}
    assert torch.equal(reader.piece("weights/w", (), (1, 4)), w.reshape(-1)[1:4])
    assert torch.equal(export_weights(reader, average=True)["w"], average)
    with pytest.raises(HanlinError, match=r"weights/w is \[3, 2\] in the checkpoint, \[2, 2\] in the model"):
        reader.put(Held("weights/w", torch.empty(2, 2), (2, 2)))
    with pytest.raises(HanlinError, match="holds no tensor 'weights/v'"):
        reader.whole("weights/v")


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a flipped bit": (lambda f: flip(f / part_file(1)), "rank-1.safetensors has other contents"),
    "a torn file": (lambda f: (f / part_file(0)).write_bytes(b"torn"), "rank-0.safetensors has 4 bytes"),
    "a lost file": (lambda f: (f / part_file(1)).unlink(), "rank-1.safetensors is missing"),
    "a forgotten file": (
        lambda f: edit(f, lambda m: m["files"].pop("rank-1.safetensors")), "is not the manifest of a checkpoint"
    ),
    "a forgotten piece": (
        lambda f: edit(f, lambda m: m["tensors"]["weights/w"]["pieces"].pop()), "weights/w of step-7 cannot be read"
    ),
}  # fmt: skip


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    two_ranks(tmp_path / "step-7")
    hurt, message = DAMAGES[damage]
    hurt(tmp_path / "step-7")
    with pytest.raises(DamagedCheckpointError, match=message):
        export_weights(open_checkpoint(tmp_path / "step-7"))


def test_a_rank_that_failed_leaves_no_checkpoint(tmp_path):
    folder = tmp_path / "step-7"
    mine = [[Held("weights/w", numbers((4,))[half], (4,), (), span).place] for half, span in
            ((slice(2), (0, 2)), (slice(2, 4), (2, 4)))]  # fmt: skip
    shared_folder(folder).mkdir()
    write_part(folder, 0, {"weights/w": numbers((4,))[:2]})
    with pytest.raises(KeyError):
        write_part(folder, 1, {"weights/w": numbers((4,)).to(torch.complex64)})
    with pytest.raises(HanlinError, match="given up: process 1 did not write its part"):
        finish_parts(folder, 7, b"{}", mine)
    assert list(tmp_path.iterdir()) == []


def test_joining_one_whole_piece_copies_nothing():
    whole = numbers((4, 2))
    place = Held("weights/w", whole, (4, 2)).place
    assert join((4, 2), [(place, whole)]) is whole
