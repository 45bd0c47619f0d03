"""One safetensors file, written piece by piece: nothing is held twice, the hash is made on the way, a full disk is an
`OSError`.

    8 bytes little-endian header length · the header as JSON, padded to 8 bytes · the tensors' bytes, one after another
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 22  # bytes hashed and written at a time: what was hashed is still in the cache when it is written
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; returns its SHA-256, of what was meant to be written. Views of one fused buffer need no
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
    digest = hashlib.sha256()
    with Path(path).open("wb", buffering=0) as stream:

        def put(data: memoryview) -> None:
            for start in range(0, len(data), PIECE):
                piece = data[start : start + PIECE]
                digest.update(piece)
                while piece:  # an unbuffered write may take a part only
                    piece = piece[stream.write(piece) or 0 :]

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            put(memoryview(data))
    return digest.hexdigest()
