"""GGUF, the one-file format of llama.cpp, read through a memory map: a header, metadata, tensors.

    "GGUF"  version  number of tensors  number of metadata entries
    metadata    key, type, value                     (architecture, sizes, the tokenizer)
    tensors     name, shape (fastest first), type, offset
    padding to `general.alignment`, then the tensors' bytes, each aligned

Quantised rows are cut into blocks of 32 numbers; with d and m in half precision, and q unsigned from 4 bits:

    Q8_0   d, 32 signed bytes q          x = d q              34 bytes
    Q4_0   d, 16 bytes of two q          x = d (q - 8)        18 bytes
    Q4_1   d, m, 16 bytes of two q       x = d q + m          20 bytes     (low halves: the first 16 numbers)

Specification: github.com/ggml-org/ggml, docs/gguf.md. Every length is checked against the file before it is used.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanlin.core.errors import HanlinError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BLOCK = 32  # numbers in a block of every quantised type that is read here
SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (BLOCK, 18), "Q4_1": (BLOCK, 20), "Q8_0": (BLOCK, 34)}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"}
TYPES |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
TYPES |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
TYPES |= {29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 10: "u8", 11: "i8", 12: "f8"}  # metadata
BOOL, STRING, ARRAY = 7, 8, 9
CHUNK = 1 << 22  # numbers that are dequantised at a time: 16 MB


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. shape: as torch has it (rows first). kind: "F32", "Q4_0" …; size: its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


class GgufFile:
    """A GGUF file, opened and checked: `metadata` and `tensors` are dictionaries, `read` gives a tensor's numbers.

    Not a GGUF file, another version, big-endian, cut off, an unknown type of tensor, a range outside the file: each is
    a `HanlinError`. Types that are known but not read (`Q4_K` …) are refused by `read`, by name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "does not exist"
            raise HanlinError(f"{self.path} {what}. Expected a .gguf file.")
        if self.path.stat().st_size < 24:
            raise HanlinError(f"{self.path} is no GGUF file: it has {self.path.stat().st_size} bytes.")
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        cursor = _Cursor(self._bytes, self.path)
        tensors, entries = _read_start(cursor)
        self.metadata: Mapping[str, Any] = _read_metadata(cursor, entries)
        self.tensors: Mapping[str, GgufTensor] = _read_tensors(cursor, tensors, self.metadata)

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers of a tensor, a copy. dtype: default as stored, float32 where it is quantised."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise HanlinError(f"{self.path} has no tensor {name!r}.")
        if tensor.kind not in SIZES:
            raise HanlinError(refusal(self.path, [tensor]))
        numbers, bytes_ = SIZES[tensor.kind]
        out = torch.empty(math.prod(tensor.shape), dtype=dtype or PLAIN.get(tensor.kind, torch.float32))
        for start in range(0, out.numel(), CHUNK):
            end = min(start + CHUNK, out.numel())
            place = slice(tensor.offset + start // numbers * bytes_, tensor.offset + end // numbers * bytes_)
            out[start:end] = dequantise(self._bytes[place], tensor.kind)
        return out.view(tensor.shape)


def dequantise(data: np.ndarray, kind: str) -> Tensor:
    """Bytes (n,) uint8 of whole blocks of type `kind` -> their numbers (count,): float32, or as stored."""
    if kind in PLAIN:
        return torch.from_numpy(np.array(data)).view(PLAIN[kind])
    blocks = data.reshape(-1, SIZES[kind][1])
    scale = _halves(blocks[:, 0:2])  # (blocks, 1)
    if kind == "Q8_0":
        return torch.from_numpy((blocks[:, 2:].view(np.int8) * scale).ravel())
    packed = blocks[:, 2:] if kind == "Q4_0" else blocks[:, 4:]  # (blocks, 16)
    numbers = np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.float32)  # (blocks, 32)
    numbers = (numbers - 8) * scale if kind == "Q4_0" else numbers * scale + _halves(blocks[:, 2:4])
    return torch.from_numpy(numbers.ravel())


def refusal(path: Path, tensors: list[GgufTensor]) -> str:
    """Why these tensors cannot be read."""
    kinds = ", ".join(sorted({tensor.kind for tensor in tensors}))
    return (
        f"{path}: {tensors[0].name!r}{f' and {len(tensors) - 1} more' if tensors[1:] else ''} of type {kinds}; Hanlin "
        f"reads {', '.join(SIZES)}. Take another file of the same model (Q8_0 is the nearest to the original)."
    )


class _Cursor:
    """Reads values one after the other; never past the end."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise HanlinError(
                f"{self.path} is cut off: at byte {self.at:,} it announces {size:,} more, but ends at "
                f"{len(self.data):,}. Copy or download it again."
            )
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        at = self.at
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise HanlinError(f"{self.path}: the text at byte {at:,} is not UTF-8 ({error}).") from error

    def value(self, kind: int, key: str) -> Any:
        if kind in NUMBERS:
            return np.frombuffer(self.take(int(NUMBERS[kind][1])), f"<{NUMBERS[kind]}")[0].item()
        if kind == BOOL:
            return self.take(1) != b"\0"
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise HanlinError(f"{self.path}: metadata {key!r} is of type {kind}, which GGUF does not have.")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            return np.frombuffer(self.take(count * int(NUMBERS[inner][1])), f"<{NUMBERS[inner]}").tolist()
        if inner == BOOL:
            return [byte != 0 for byte in self.take(count)]
        if inner != STRING:
            raise HanlinError(f"{self.path}: metadata {key!r} is an array of type {inner}; expected numbers or text.")
        texts: list[str] = []
        while len(texts) < count:  # each takes eight bytes at least, so a false count ends at the file's end
            texts.append(self.text())
        return texts


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """(tensors, metadata entries)."""
    magic, path = cursor.take(4), cursor.path
    if magic != MAGIC:
        raise HanlinError(f"{path} is no GGUF file: it begins with {magic!r}, not with {MAGIC!r}.")
    version = cursor.number("I")
    if version & 0xFFFF == 0:  # small numbers, with their bytes swapped
        raise HanlinError(f"{path} is a big-endian GGUF file; Hanlin reads little-endian ones. Convert it again.")
    if version not in VERSIONS:
        raise HanlinError(f"{path} is GGUF version {version}; Hanlin reads {' and '.join(map(str, VERSIONS))}.")
    return cursor.number("Q"), cursor.number("Q")


def _read_metadata(cursor: _Cursor, entries: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text()
        if key in found:
            raise HanlinError(f"{cursor.path}: metadata {key!r} stands there twice.")
        found[key] = cursor.value(cursor.number("I"), key)
    return found


def _read_tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
    path, found = cursor.path, dict[str, GgufTensor]()
    for _ in range(count):
        name = cursor.text()
        dimensions = cursor.number("I")
        if not 1 <= dimensions <= 4 or name in found:
            what = "stands there twice" if name in found else f"has {dimensions} dimensions; expected 1 to 4"
            raise HanlinError(f"{path}: tensor {name!r} {what}.")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        number, offset = cursor.number("I"), cursor.number("Q")
        if number not in TYPES:
            raise HanlinError(f"{path}: tensor {name!r} is of type number {number}, which Hanlin does not know.")
        numbers, size = SIZES.get(TYPES[number], (1, 0))
        if shape[-1] % numbers:
            raise HanlinError(f"{path}: tensor {name!r} of shape {shape} has rows that are no multiple of {numbers}.")
        found[name] = GgufTensor(name, shape, TYPES[number], offset, math.prod(shape) // numbers * size)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise HanlinError(f"{path}: `general.alignment` is {alignment!r}; expected a multiple of 8.")
    start, end = -(-cursor.at // alignment) * alignment, len(cursor.data)
    placed: dict[str, GgufTensor] = {}
    for tensor in found.values():
        place = start + tensor.offset
        if tensor.offset % alignment or place + tensor.size > end:
            what = f"ends at byte {place + tensor.size:,} of a file of {end:,}: it is cut off"
            what = f"begins at {tensor.offset:,}, no multiple of {alignment}" if tensor.offset % alignment else what
            raise HanlinError(f"{path}: tensor {tensor.name!r} {what}. Copy or download it again.")
        placed[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.kind, place, tensor.size)
    return placed


def _halves(two_bytes: np.ndarray) -> np.ndarray:
    """(blocks, 2) bytes -> (blocks, 1) float32."""
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)
