"""Checkpoints: `checkpoints/step-N/`, whole or absent, verified before a byte of them is believed.

    model.safetensors      weights under their Hugging Face names (a tied head once)
    optimizer.safetensors  the optimiser's tensors, "NAME/exp_avg" ..., and torch's random states, "random/cpu"
    state.json             step, tokens, seconds, what decides the run (settings, data, model), random states
    manifest.json          SHA-256 and size of the three

The folder is written under a temporary name, fsynced and renamed (`core.files.atomic_folder`), so a killed process
leaves no half of one. What a disk or a person damages later is found by the hashes: then the checkpoint before it is
taken, and the damaged folder is set aside as `damaged-step-N`. Nothing here is pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, file_hash, read_json
from hanlin.core.runs import Run
from hanlin.train.ranks import Ranks

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class DamagedCheckpointError(HanlinError):
    """A checkpoint that is not what was written; the text says which file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """state: JSON values (see `trainer`); model and optimizer: tensors by name, on the CPU."""

    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write all four files into `folder`, atomically. A full disk is a `HanlinError`; what was there before stays."""
    with atomic_folder(folder) as temporary:
        state = json.dumps(checkpoint.state, ensure_ascii=False).encode()  # a metric's sum may be NaN; read by us only
        (temporary / STATE).write_bytes(state)
        hashes = {
            MODEL: write_tensors(temporary / MODEL, checkpoint.model),
            OPTIMIZER: write_tensors(temporary / OPTIMIZER, checkpoint.optimizer),
            STATE: hashlib.sha256(state).hexdigest(),
        }
        files = {
            name: {"sha256": digest, "bytes": (temporary / name).stat().st_size} for name, digest in hashes.items()
        }
        manifest = {"format": FORMAT, "step": checkpoint.step, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose every hash holds, or `DamagedCheckpointError` that names the file and the difference."""
    try:
        manifest = read_json(folder / MANIFEST)
    except HanlinError as error:
        raise DamagedCheckpointError(str(error)) from error
    try:
        version, files = manifest["format"], dict(manifest["files"])
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (MODEL, OPTIMIZER, STATE)}
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder / MANIFEST} is not the manifest of a checkpoint.") from error
    if version != FORMAT:
        raise HanlinError(
            f"{folder} was written in checkpoint format {version!r}; this version of Hanlin reads format {FORMAT}. "
            "Continue with the version that wrote it, or start a new run."
        )
    for name, (size, digest) in expected.items():
        _verify(folder / name, size, digest)
    return Checkpoint(read_json(folder / STATE), load_file(folder / MODEL), load_file(folder / OPTIMIZER))


def newest_checkpoint(run: Run, notice: Callable[[str], None], *, set_aside: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint of `run`; None if there is none at all.

    A damaged one is passed over with a `notice` that names what is wrong, and set aside so that it is not counted among
    the kept ones (set_aside=False leaves it, for a process that only reads). If every one is damaged: `HanlinError`.
    """
    damaged: list[tuple[Path, str]] = []
    for _, folder in reversed(run.checkpoints()):
        try:
            found = read_checkpoint(folder)
        except DamagedCheckpointError as error:
            damaged.append((folder, str(error)))
            continue
        for bad, reason in damaged:
            aside = f" It is set aside as {_set_aside(bad).name}." if set_aside else ""
            notice(f"{bad} is damaged: {reason}{aside} Continuing from {folder.name} instead.")
        return found
    if damaged:
        reasons = " ".join(f"{folder.name}: {reason}" for folder, reason in damaged)
        raise HanlinError(
            f"No checkpoint in {run.path / 'checkpoints'} can be read. {reasons} "
            "Restore one of them, or delete that folder to start from the beginning."
        )
    return None


def prune_checkpoints(run: Run, keep_last: int, best: int | None = None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one of step `best`."""
    for step, folder in run.checkpoints()[:-keep_last]:
        if step != best:
            doomed = folder.with_name(f".partial-old-{folder.name}")  # gone at once for every reader, then deleted
            folder.replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class Keeper:
    """The checkpoints of a run that several ranks share: the first writes, prunes and sets aside, the others wait."""

    def __init__(self, run: Run, ranks: Ranks, *, keep_last: int, notice: Callable[[str], None]) -> None:
        self.run, self._ranks, self._keep_last, self._notice = run, ranks, keep_last, notice

    def newest(self) -> Checkpoint | None:
        """See `newest_checkpoint`."""
        if not self._ranks.first:  # what is damaged is set aside before the others look
            self._ranks.wait()
        found = newest_checkpoint(self.run, self._notice, set_aside=self._ranks.first)
        if self._ranks.first:
            self._ranks.wait()
        return found

    def save(self, checkpoint: Checkpoint, best: int | None) -> None:
        """Write, then delete those that are no longer kept; `best` is a step to keep besides."""
        if self._ranks.first:
            write_checkpoint(self.run.checkpoint(checkpoint.step), checkpoint)
            prune_checkpoints(self.run, self._keep_last, best)
        self._ranks.wait()

    def last_good(self) -> str:
        """A sentence about where an error can go back to."""
        there = self.run.checkpoints()
        if not there:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {there[-1][1]}."


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file tensor by tensor; returns its SHA-256, of what was meant to be written.

    Layout: 8 bytes little-endian header length, the header as JSON padded to 8 bytes, the data. Written by hand so that
    views of one fused buffer need no copy, nothing is held twice, and a full disk is an `OSError`.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with Path(path).open("wb") as stream:
        for piece in (len(text).to_bytes(8, "little"), text):
            stream.write(piece)
            digest.update(piece)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            stream.write(data)
            digest.update(data)
    return digest.hexdigest()


def _verify(file: Path, size: int, digest: str) -> None:
    if not file.is_file():
        raise DamagedCheckpointError(f"{file.name} is missing.")
    found = file.stat().st_size
    if found != size:
        raise DamagedCheckpointError(f"{file.name} has {found} bytes, its manifest says {size}.")
    if file_hash(file) != digest:
        raise DamagedCheckpointError(f"{file.name} has other contents than its manifest says (SHA-256).")


def _set_aside(folder: Path) -> Path:
    target = folder.with_name(f"damaged-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    folder.replace(target)
    return target
