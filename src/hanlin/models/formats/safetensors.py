"""Weights as safetensors: one `model.safetensors`, or shards with `model.safetensors.index.json`.

Reading maps the files into memory and copies nothing until a tensor is used. Writing is atomic file by file; of several
files the index comes last, so a reader never finds an index whose shards are not there.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path, read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def find_weights(folder: Path) -> dict[str, Path]:
    """Name of every weight in a model folder -> the file that holds it. Reads headers only.

    A folder without safetensors, a shard that the index names and the folder lacks, a truncated file, a weight that
    stands in another file than the index says: each is a `HanlinError`.
    """
    if (folder / SINGLE).exists():
        return dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
    if not (folder / INDEX).exists():
        _refuse_folder(folder)
    table = read_json(folder / INDEX)
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not all(isinstance(v, str) and Path(v).name == v for v in table.values()):
        raise HanlinError(f'{folder / INDEX}: "weight_map" must be an object of weight names to file names beside it.')
    held: dict[str, Path] = {}
    for file in sorted(set(table.values())):
        if not (folder / file).exists():
            raise HanlinError(f"{folder / INDEX} names {file}, which is not in the folder. Fetch the missing shard.")
        for name in _names(folder / file):
            if table.get(name) != file:
                raise HanlinError(f"{folder / file} holds the weight {name!r}, which {INDEX} does not place there.")
            held[name] = folder / file
    absent = sorted(table.keys() - held.keys())
    if absent:
        raise HanlinError(f"{folder / table[absent[0]]} lacks the weight {absent[0]!r}, which {INDEX} places there.")
    return held


class WeightReader:
    """Reads weights that `find_weights` found, in any order, mapped and not yet copied; a context manager."""

    def __init__(self, held: Mapping[str, Path]) -> None:
        self._held = held
        self._files = ExitStack()
        self._streams: dict[Path, Any] = {}

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def read(self, name: str) -> Tensor:
        file = self._held[name]
        if file not in self._streams:
            self._streams[file] = self._files.enter_context(_open(file))
        return self._streams[file].get_tensor(name)


def read_shapes(held: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every weight, from the headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in set(held.values()):
        with _open(file) as stream:
            shapes |= {n: tuple(stream.get_slice(n).get_shape()) for n, place in held.items() if place == file}
    return shapes


def write_weights(tensors: Mapping[str, Tensor], folder: Path, *, shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (one larger tensor fills a shard of its own).

    Files of an earlier save that would contradict the new ones are removed after they are whole.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.detach().contiguous()
        filled += size
    if len(shards) == 1:
        _write(shards[0], folder / SINGLE)
        stale = [folder / INDEX, *_shards(folder)]
    else:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for file, shard in zip(files, shards, strict=True):
            _write(shard, folder / file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        table = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
        stale = [folder / SINGLE, *(file for file in _shards(folder) if file.name not in files)]
    for file in stale:
        file.unlink(missing_ok=True)


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _shards(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if _SHARD.fullmatch(file.name)]


def _names(file: Path) -> list[str]:
    with _open(file) as stream:
        return list(stream.keys())


def _open(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise HanlinError(
            f"{file} is not a whole safetensors file ({error}). It was probably cut off while it was copied or "
            f"downloaded ({file.stat().st_size:,} bytes are there); fetch it again."
        ) from error


def _refuse_folder(folder: Path) -> None:
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise HanlinError(
            f"{folder} has its weights as {pickled[0]}, a pickle. Hanlin reads safetensors only: a pickle can run any "
            f"program when it is opened. Convert it where you trust it, and keep {SINGLE}."
        )
    raise HanlinError(f"{folder} has no weights: neither {SINGLE} nor {INDEX} is there.")


FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
