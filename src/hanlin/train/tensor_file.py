"""One safetensors file, written piece by piece: nothing is held twice, the checksum is made on the way, a full disk is
an `OSError`.

    8 bytes little-endian header length · the header as JSON, padded to 8 bytes · the tensors' bytes, one after another

Pieces go to the disk past the cache of the system (`O_DIRECT`) where the file system can: that cache costs a training
its memory and its processors, 0.1 s instead of 0.4 to 1.4 s a GB here, and nobody reads the file soon.
"""

import errno
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 20  # bytes summed and written at a time; they stay in the processor's cache between the two
BLOCK = 4096  # what a disk is written in
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; returns its CRC-32, of what was meant to be written. Views of one fused buffer need no
    copy; a tensor of a GPU is brought over when its turn comes."""
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
    with _SummedFile(Path(path)) as file:
        file.put(np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8))
        for tensor in tensors.values():
            file.put(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return file.finish()


class _SummedFile:
    """A file that is written once from front to end, through one aligned piece of memory."""

    def __init__(self, path: Path) -> None:
        self._piece = mmap.mmap(-1, PIECE)  # pages of its own: aligned, as O_DIRECT wants it
        self._numbers = np.frombuffer(self._piece, np.uint8)
        self._held, self._size = 0, 0
        self._sum = 0
        self._path, self._flags = path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        try:
            self._file = os.open(path, self._flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, self._flags, 0o666)  # a file system without

    def __enter__(self) -> "_SummedFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def put(self, data: np.ndarray) -> None:
        """Append bytes, (n,) uint8."""
        at = 0
        while at < len(data):
            count = min(PIECE - self._held, len(data) - at)
            self._numbers[self._held : self._held + count] = data[at : at + count]  # numpy leaves Python's lock here
            self._held, at = self._held + count, at + count
            if self._held == PIECE:
                self._write()

    def finish(self) -> str:
        """Write what is left; the CRC-32 of all, eight hexadecimal digits."""
        if self._held:
            self._write()
        return f"{self._sum:08x}"

    def _write(self) -> None:
        held, self._held = self._held, 0
        self._sum = zlib.crc32(memoryview(self._piece)[:held], self._sum)
        padded = -(-held // BLOCK) * BLOCK
        self._numbers[held:padded] = 0
        try:
            self._write_all(padded)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._file)  # opened past the cache, yet not written
            self._file = os.open(self._path, self._flags & ~os.O_TRUNC)
            os.lseek(self._file, self._size, os.SEEK_SET)
            self._write_all(padded)
        self._size += held
        if padded != held:
            os.ftruncate(self._file, self._size)

    def _write_all(self, count: int) -> None:
        view, at = memoryview(self._piece), 0
        while at < count:
            at += os.write(self._file, view[at:count])
