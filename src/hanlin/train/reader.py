"""Reading a checkpoint, whichever format it has: whole tensors, or the piece a rank wants, one tensor at a time.

    format 1   model.safetensors, optimizer.safetensors        one process wrote all of it
    format 2   rank-0.safetensors, rank-1.safetensors ...      each process wrote pieces; the manifest says how they sit

Names are the same in both: "weights/NAME", "optimizer/NAME/exp_avg", "average/NAME", "random/cpu". Every file's CRC-32
is compared before a byte of it is believed. Nothing here is pickle.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.files import file_crc32, file_hash, read_json
from hanlin.train.sharded import Held, Place, Share, Span, fill, join, local_shape, overlap, take
from hanlin.train.tensor_file import DTYPES

ONE_FILE_SET, SHARDED = 1, 2
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
WEIGHTS, MOMENTS, AVERAGE, RANDOM, BALANCE = "weights/", "optimizer/", "average/", "random/", "balance/"
READERS = 8  # files summed at a time


class DamagedCheckpointError(HanlinError):
    """A checkpoint that is not what was written; the text says which file and what is wrong with it."""


class CheckpointReader:
    """A checkpoint on disk. state: its JSON; step: of the optimizer; world: how many processes wrote it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.world = int(manifest.get("world", 1))
        self.state: dict[str, Any] = read_json(folder / STATE)
        self._pieces = _pieces(folder, manifest)
        self._files: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def names(self, prefix: str = "") -> list[str]:
        """Of the tensors, all or those that begin with `prefix`."""
        return [name for name in self._pieces if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._of(name)[0][0].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name)[0][0].dtype

    def whole(self, name: str) -> Tensor:
        """One whole tensor, joined from its pieces, on the CPU."""
        with self._reading(name):
            pieces = [(place, self._tensor(file, key)) for place, file, key in self._of(name)]
            return join(self.shape(name), pieces)

    def piece(self, name: str, cuts: Sequence[Share] = (), span: Span | None = None) -> Tensor:
        """What `sharded.take` would take of the whole tensor. Where the pieces were cut alike, only what is wanted is
        read; else the whole tensor is put together first."""
        alike = [entry for entry in self._of(name) if entry[0].cuts == tuple(cuts)]
        if not alike:
            return take(self.whole(name), cuts, span)
        shape = local_shape(self.shape(name), cuts)
        wanted = span or (0, prod(shape))
        with self._reading(name):
            parts = []
            for place, file, key in alike:
                begin, end = overlap(place, wanted)
                if begin < end:
                    start = place.span[0] if place.span else 0
                    parts.append((place, self._numbers(file, key, place, begin - start, end - start)))
            local = fill(parts, wanted) if parts else torch.empty(0, dtype=self.dtype(name))
        return local.view(shape) if span is None else local

    def put(self, held: Held) -> None:
        """Fill a rank's tensor with its piece of the tensor of that name, in place; `HanlinError` if it has another
        shape."""
        if self.shape(held.name) != held.shape:
            raise HanlinError(
                f"{held.name} is {list(self.shape(held.name))} in the checkpoint, {list(held.shape)} in the model."
            )
        with torch.no_grad():
            held.tensor.copy_(self.piece(held.name, held.cuts, held.span))

    @property
    def model(self) -> dict[str, Tensor]:
        """The whole weights under their Hugging Face names."""
        return {name.removeprefix(WEIGHTS): self.whole(name) for name in self.names(WEIGHTS)}

    def _of(self, name: str) -> list[tuple[Place, str, str]]:
        if name not in self._pieces:
            raise HanlinError(f"{self.folder} holds no tensor {name!r}.")
        return self._pieces[name]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]

    def _tensor(self, file: str, key: str) -> Tensor:
        return self._open(file).get_tensor(key)

    def _numbers(self, file: str, key: str, place: Place, start: int, stop: int) -> Tensor:
        """Some of a piece's numbers, flat."""
        if place.span is not None:
            return self._open(file).get_slice(key)[start:stop]
        return self._tensor(file, key).reshape(-1)[start:stop]

    @contextmanager
    def _reading(self, name: str):
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedCheckpointError(f"{name} of {self.folder.name} cannot be read: {error}.") from error


def open_checkpoint(folder: str | os.PathLike[str], *, verify: bool = True) -> CheckpointReader:
    """A checkpoint whose every checksum holds, or `DamagedCheckpointError` that names the file and the difference.

    verify=False: believe the files; for a process whose neighbour has compared them.
    """
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
    except HanlinError as error:
        raise DamagedCheckpointError(str(error)) from error
    try:
        version = manifest["format"]
        files = {str(name): (int(about["bytes"]), *_sum_of(about)) for name, about in manifest["files"].items()}
        required = {STATE} | ({MODEL, OPTIMIZER} if version == ONE_FILE_SET else set())
        if version == SHARDED:
            required |= {piece["file"] for about in manifest["tensors"].values() for piece in about["pieces"]}
        if version in (ONE_FILE_SET, SHARDED) and not required <= files.keys():
            raise KeyError(sorted(required - files.keys()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder / MANIFEST} is not the manifest of a checkpoint.") from error
    if version not in (ONE_FILE_SET, SHARDED):
        raise HanlinError(
            f"{folder} was written in checkpoint format {version!r}; this version of Hanlin reads formats "
            f"{ONE_FILE_SET} and {SHARDED}. Continue with the version that wrote it, or start a new run."
        )
    if verify:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda item: _verify(folder / item[0], *item[1]), files.items()))
    return CheckpointReader(folder, manifest)


def export_weights(reader: CheckpointReader, *, average: bool = False) -> dict[str, Tensor]:
    """The whole weights of a checkpoint under their Hugging Face names, whatever layout wrote it; average: the running
    averages where they were kept, `HanlinError` if none were."""
    if not average:
        return reader.model
    averaged = {name.removeprefix(AVERAGE) for name in reader.names(AVERAGE)}
    if not averaged:
        raise HanlinError(f"{reader.folder} holds no averages of its weights: the run was made without train.average.")
    weights = {}
    for name in reader.names(WEIGHTS):
        bare = name.removeprefix(WEIGHTS)
        weights[bare] = reader.whole((AVERAGE if bare in averaged else WEIGHTS) + bare)
    return weights


def name_in_file(name: str) -> tuple[str, str]:
    """(file, key) of a tensor in format 1."""
    if name.startswith(WEIGHTS):
        return MODEL, name.removeprefix(WEIGHTS)
    return OPTIMIZER, name.removeprefix(MOMENTS)


def _pieces(folder: Path, manifest: dict[str, Any]) -> dict[str, list[tuple[Place, str, str]]]:
    """Of each tensor its pieces, with the file and the key of each."""
    found: dict[str, list[tuple[Place, str, str]]] = {}
    try:
        if manifest["format"] == SHARDED:
            for name, about in manifest["tensors"].items():
                dtype, shape = DTYPES[about["dtype"]], tuple(map(int, about["shape"]))
                found[name] = [
                    (Place.from_json(name, dtype, shape, piece), piece["file"], piece["key"])
                    for piece in about["pieces"]
                ]
            return found
        for file in (MODEL, OPTIMIZER):
            with safe_open(folder / file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(key)
                    name = _name_of(file, key)
                    place = Place(name, DTYPES[part.get_dtype()], tuple(part.get_shape()))
                    found[name] = [(place, file, key)]
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"The tensors of {folder} cannot be listed: {error}.") from error
    return found


def _name_of(file: str, key: str) -> str:
    if file == MODEL:
        return WEIGHTS + key
    return key if key.startswith((AVERAGE, RANDOM, BALANCE)) else MOMENTS + key


def _sum_of(about: dict[str, Any]) -> tuple[str, str]:
    """("CRC-32", digits), or of a checkpoint that an earlier version wrote ("SHA-256", digits)."""
    return ("CRC-32", str(about["crc32"])) if "crc32" in about else ("SHA-256", str(about["sha256"]))


def _verify(file: Path, size: int, kind: str, digits: str) -> None:
    if not file.is_file():
        raise DamagedCheckpointError(f"{file.name} is missing.")
    found = file.stat().st_size
    if found != size:
        raise DamagedCheckpointError(f"{file.name} has {found} bytes, its manifest says {size}.")
    if (file_crc32 if kind == "CRC-32" else file_hash)(file) != digits:
        raise DamagedCheckpointError(f"{file.name} has other contents than its manifest says ({kind}).")
