"""Checkpoints: written whole or not at all, verified before they are believed, kept as many as asked for."""

import errno
import json
import pickletools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import assert_same_bits, tiny_model, train, weights

from hanlin.core.errors import HanlinError
from hanlin.core.files import file_crc32
from hanlin.core.runs import Run
from hanlin.train import checkpoint
from hanlin.train.checkpoint import newest_checkpoint
from hanlin.train.reader import open_checkpoint
from hanlin.train.tensor_file import write_tensors


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in Run.open(folder).checkpoints()]


def test_tensor_files_are_safetensors_in_every_dtype_and_of_views(tmp_path):
    buffer = torch.randn(6, 4)
    tensors = {
        "view": buffer[2:5],
        "transposed": buffer.T,
        "bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "bytes": torch.get_rng_state(),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(5),
        "名": torch.randn(2, dtype=torch.float64),
    }
    digest = write_tensors(tmp_path / "t.safetensors", tensors)
    assert digest == file_crc32(tmp_path / "t.safetensors")
    assert_same_bits(load_file(tmp_path / "t.safetensors"), tensors)


def test_a_checkpoint_is_plain_files_under_the_hugging_face_names(tmp_path):
    train(tmp_path, {"steps": 2})
    folder = tmp_path / "checkpoints" / "step-2"
    assert sorted(f.name for f in folder.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert set(load_file(folder / "model.safetensors")) == {name for name, _ in tiny_model().named_parameters()}
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 2 and state["identity"]["data"]["kind"] == "tiny"
    for file in folder.iterdir():  # no pickle hides in any of them
        with pytest.raises((ValueError, KeyError, IndexError)):
            list(pickletools.genops(file.read_bytes()))


def test_the_last_ones_are_kept_and_the_best(tmp_path):
    train(tmp_path / "last", {"steps": 9, "save_every": 2, "keep_last": 3})
    assert steps_of(tmp_path / "last") == [6, 8, 9]
    losses = iter([3.0, 1.0, 2.0, 4.0])
    settings = {"steps": 8, "save_every": 2, "eval_every": 2, "keep_last": 1, "keep_best": True}
    train(tmp_path / "best", settings, evaluate=lambda model, step: {"eval/loss": next(losses)})
    assert steps_of(tmp_path / "best") == [4, 8]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a flipped bit": (lambda f: flip(f / "model.safetensors"), "model.safetensors has other contents"),
    "a torn file": (lambda f: (f / "optimizer.safetensors").write_bytes(b"torn"), "optimizer.safetensors has 4 bytes"),
    "a lost file": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "a lost manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json does not exist"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), "is not the manifest"),
    "a cut manifest": (lambda f: (f / "manifest.json").write_text('{"for'), "is not valid JSON"),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    train(folder, {"steps": 6})
    return weights(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage, uninterrupted, capsys):
    train(tmp_path, {"steps": 6, "save_every": 2, "keep_last": 3})
    hurt, message = DAMAGES[damage]
    hurt(tmp_path / "checkpoints" / "step-6")
    train(tmp_path, {"steps": 6})
    said = capsys.readouterr().err
    assert message in said and "Continuing from step-4" in said and "damaged-step-6" in said
    assert steps_of(tmp_path) == [4, 6]
    assert_same_bits(weights(tmp_path), uninterrupted)


def test_only_damaged_checkpoints_stop_the_run_instead_of_starting_over(tmp_path):
    train(tmp_path, {"steps": 3, "save_every": 1})
    for folder in (tmp_path / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    with pytest.raises(
        HanlinError, match=r"No checkpoint .* can be read\. step-3: model\.safetensors has other contents"
    ):
        train(tmp_path, {"steps": 3})
    assert steps_of(tmp_path) == [2, 3]


def test_a_newer_format_is_refused_not_skipped(tmp_path):
    train(tmp_path, {"steps": 1})
    manifest = tmp_path / "checkpoints" / "step-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(HanlinError, match="format 3; this version of Hanlin reads formats 1 and 2"):
        open_checkpoint(manifest.parent)


def test_a_full_disk_ends_with_one_paragraph_and_the_old_checkpoint_lives(tmp_path, monkeypatch):
    """/dev/full is a disk without space: the kernel itself answers the writes with ENOSPC."""
    train(tmp_path, {"steps": 4, "save_every": 2, "schedule": {"kind": "constant"}})
    before = weights(tmp_path)
    with pytest.raises(OSError, match="No space left") as real:
        write_tensors("/dev/full", before)
    assert real.value.errno == errno.ENOSPC
    monkeypatch.setattr(checkpoint, "write_tensors", lambda path, tensors: write_tensors("/dev/full", tensors))
    with pytest.raises(HanlinError, match=r"disk is full: .*step-6 .*Nothing that was there before is lost"):
        train(tmp_path, {"steps": 8, "save_every": 2, "schedule": {"kind": "constant"}})
    monkeypatch.undo()
    assert steps_of(tmp_path) == [2, 4]
    assert not [f for f in (tmp_path / "checkpoints").iterdir() if f.name.startswith(".")]
    assert_same_bits(weights(tmp_path), before)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(Run.open(tmp_path), pytest.fail) is None
