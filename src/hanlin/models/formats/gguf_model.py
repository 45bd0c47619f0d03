"""A GGUF file -> a model folder in the Hugging Face layout: config.json, safetensors, the tokenizer's files.

llama.cpp has its own names, and lays out llama's q and k so that the two numbers of a rotary pair are neighbours: in
each head row 2 i comes from row i of the first half and row 2 i + 1 from row i of the second. Here they go back to the
two halves. Other architectures keep the halves.

A tensor that is missing, left over, of another shape or of a type that is not read is refused by name before anything
is written; the folder appears whole or not at all.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, write_json
from hanlin.core.progress import Progress
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.families import find_family
from hanlin.models.formats.gguf import PLAIN, SIZES, GgufFile, refusal
from hanlin.models.formats.gguf_config import ARCHITECTURES, FREQUENCIES, read_config
from hanlin.models.formats.gguf_tokenizer import GgufTokenizer, read_tokenizer
from hanlin.models.formats.safetensors import INDEX, SINGLE
from hanlin.tokens.folder import write_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5_000_000_000
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert_gguf(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = False,
) -> ModelConfig:
    """Write the model in the GGUF file `path` as folder `out`, whole or not at all; a folder there is replaced.

    dtype: of the written weights, "float32", "bfloat16", "float16", or "auto": as stored, bfloat16 where they are
    quantised (its rounding is far below theirs). shard_bytes: of one file; no more is held in memory.
    """
    if dtype not in ("auto", *DTYPES):
        raise HanlinError(f"Unknown dtype {dtype!r}; it is one of: auto, {', '.join(DTYPES)}.")
    file = GgufFile(path)
    tokenizer = read_tokenizer(file.metadata, file.path)
    config = read_config(file, tokenizer)
    rows = _bind(file, config)
    target = DTYPES.get(dtype) or _auto_dtype(file)
    with atomic_folder(out) as folder:
        _write_weights(file, rows, target, folder, shard_bytes, quiet=quiet)
        write_folder(folder, tokenizer.files)
        _write_config(config, tokenizer, target, folder)
    return config


@dataclass(frozen=True)
class _Row:
    """A weight's names there and here, its shape, and how many heads' rows go back to two halves (0: none)."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    heads: int = 0


def _rows(config: ModelConfig, file: GgufFile) -> Iterator[_Row]:
    """What the file must hold."""
    arch, first, width = ARCHITECTURES[config.family], config.layers[0], config.width
    attention, feed_forward = first.attention, first.feed_forward
    assert isinstance(attention, AttentionConfig) and isinstance(feed_forward, FeedForwardConfig)
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    for theirs, ours in OUTSIDE.items():
        if theirs != "output.weight" or not config.tied_embeddings:
            yield _Row(theirs, ours, (width,) if "norm" in theirs else (config.vocab_size, width))
    norms = {"attn_norm": ("input_layernorm", width), "ffn_norm": ("post_attention_layernorm", width)}
    if arch.qk_norm:
        norms["attn_q_norm"] = ("self_attn.q_norm", attention.head_dim)
        norms["attn_k_norm"] = ("self_attn.k_norm", attention.head_dim)
    matrices = {
        "attn_q": ("self_attn.q_proj", (queries, width)),
        "attn_k": ("self_attn.k_proj", (keys, width)),
        "attn_v": ("self_attn.v_proj", (keys, width)),
        "attn_output": ("self_attn.o_proj", (width, queries)),
        "ffn_gate": ("mlp.gate_proj", (feed_forward.hidden, width)),
        "ffn_up": ("mlp.up_proj", (feed_forward.hidden, width)),
        "ffn_down": ("mlp.down_proj", (width, feed_forward.hidden)),
    }
    biased = {"attn_q", "attn_k", "attn_v"} if attention.qkv_bias else set[str]()
    biased |= {"attn_output"} if attention.output_bias else set()
    biased |= {"ffn_gate", "ffn_up", "ffn_down"} if feed_forward.bias else set()
    turned = {"attn_q": attention.heads, "attn_k": attention.kv_heads} if arch.permuted else {}
    for layer in range(len(config.layers)):
        there, here = f"blk.{layer}", f"model.layers.{layer}"
        for part, (name, size) in norms.items():
            yield _Row(f"{there}.{part}.weight", f"{here}.{name}.weight", (size,))
        for part, (name, shape) in matrices.items():
            yield _Row(f"{there}.{part}.weight", f"{here}.{name}.weight", shape, turned.get(part, 0))
            if part in biased:
                yield _Row(f"{there}.{part}.bias", f"{here}.{name}.bias", shape[:1], turned.get(part, 0))


def _bind(file: GgufFile, config: ModelConfig) -> list[_Row]:
    rows = list(_rows(config, file))
    for row in rows:
        tensor = file.tensors.get(row.theirs)
        if tensor is None:
            raise HanlinError(f"{file.path} has no tensor {row.theirs!r}, which this {config.family} model needs.")
        if tensor.shape != row.shape:
            raise HanlinError(f"{file.path}: {row.theirs!r} is of shape {tensor.shape}; expected {row.shape}.")
    rest = sorted(file.tensors.keys() - {row.theirs for row in rows} - {FREQUENCIES})
    if rest:
        more = f" and {len(rest) - 1} more" if rest[1:] else ""
        raise HanlinError(f"{file.path} holds {rest[0]!r}{more}, for which a {config.family} model has no place.")
    unread = [tensor for tensor in file.tensors.values() if tensor.kind not in SIZES]
    if unread:
        raise HanlinError(refusal(file.path, unread))
    return rows


def _auto_dtype(file: GgufFile) -> torch.dtype:
    """That of the matrices; bfloat16 where one is quantised, float32 where they differ."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds - PLAIN.keys():
        return torch.bfloat16
    return PLAIN[kinds.pop()] if len(kinds) == 1 else torch.float32


def _write_weights(
    file: GgufFile, rows: list[_Row], dtype: torch.dtype, folder: Path, shard_bytes: int, *, quiet: bool
) -> None:
    """One file, or shards and their index."""
    sizes = {row.ours: math.prod(row.shape) * dtype.itemsize for row in rows}
    shards: list[list[_Row]] = [[]]
    filled = 0
    for row in rows:
        if shards[-1] and filled + sizes[row.ours] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += sizes[row.ours]
    several = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = several if several[1:] else [SINGLE]
    with Progress("convert", total=sum(sizes.values()) / 1e6, unit="MB", quiet=quiet) as bar:
        for name, shard in zip(names, shards, strict=True):
            tensors: dict[str, Tensor] = {}
            for row in shard:
                tensors[row.ours] = _two_halves(file.read(row.theirs, dtype=dtype), row.heads)
                bar.advance(sizes[row.ours] / 1e6)
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if several[1:]:
        table = {row.ours: name for name, shard in zip(names, shards, strict=True) for row in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": table})


def _two_halves(values: Tensor, heads: int) -> Tensor:
    """(heads * dim, …), rotary pairs as neighbours -> the same, the pairs' first numbers before their second ones."""
    if not heads:
        return values
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # (heads, dim / 2, 2, …)
    return pairs.transpose(1, 2).reshape(values.shape).contiguous()


def _write_config(config: ModelConfig, tokenizer: GgufTokenizer, dtype: torch.dtype, folder: Path) -> None:
    """generation_config.json says which tokens end an answer; config.json comes last: with it the folder is a model."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.ends) or None, "pad_token_id": tokenizer.pad}
    write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    json = find_family(config.family, "The model's family").write(config)
    write_json(folder / "config.json", json | {"dtype": str(dtype).removeprefix("torch.")})
