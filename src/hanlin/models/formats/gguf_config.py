"""The settings inside a GGUF file -> a `ModelConfig`.

    general.architecture        the family, and the first part of the other keys
    llama.embedding_length      width                       llama.block_count         layers
    llama.feed_forward_length   feed-forward units          llama.context_length      positions
    llama.attention.head_count, head_count_kv, key_length, layer_norm_rms_epsilon
    llama.rope.freq_base, dimension_count, scaling.*

Llama 3.1 and later have their stretched frequencies as a tensor of divisors, `rope_freqs.weight`; the rule they come
from is found again. A setting that is not known here could change numbers, so it is refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families import find_family
from hanlin.models.formats.gguf import GgufFile
from hanlin.models.formats.gguf_tokenizer import GgufTokenizer
from hanlin.nn.rope_scaling import Llama3, inverse_frequencies

FREQUENCIES = "rope_freqs.weight"  # divisors of the rotary frequencies (head_dim / 2,)


@dataclass(frozen=True)
class Architecture:
    """permuted: each head's rows of q and k are laid out in rotary pairs (`gguf_model`). biases: of q, k and v always;
    wherever the file has some; nowhere. qk_norm: a norm on each query and key head. own_head_dim: heads may be of
    another width than width / heads."""

    permuted: bool = False
    biases: Literal["qkv", "stored", "none"] = "none"
    qk_norm: bool = False
    own_head_dim: bool = True


ARCHITECTURES = {  # their names are those of our families
    "llama": Architecture(permuted=True, biases="stored"),
    "qwen2": Architecture(biases="qkv", own_head_dim=False),
    "qwen3": Architecture(qk_norm=True),
}
COUNTS = {  # key behind the architecture's name -> key of config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
OTHERS = {  # read or checked below
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "vocab_size", "expert_count", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip


def read_config(file: GgufFile, tokenizer: GgufTokenizer) -> ModelConfig:
    """The `ModelConfig` that the metadata describe. `HanlinError` for an architecture or a setting that is not known,
    a value that is missing or impossible, one part of a file that was split."""
    family = file.metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise HanlinError(
            f"{file.path} is of the architecture {family!r}; Hanlin reads GGUF files of {', '.join(ARCHITECTURES)}. "
            "Of the same model as safetensors it may know the family: see docs/parity.md."
        )
    if file.metadata.get("split.count", 1) > 1:
        raise HanlinError(f"{file.path} is one of {file.metadata['split.count']} parts; merge them: llama-gguf-split.")
    arch, values = ARCHITECTURES[family], _Settings(file, family)
    values.refuse_unknown()
    json: dict[str, Any] = {theirs: values.count(ours) for ours, theirs in COUNTS.items()}
    if (depth := json["num_hidden_layers"]) > len(file.tensors):
        raise HanlinError(f"{file.path} announces {depth} layers, but holds {len(file.tensors)} tensors.")
    heads, even = json["num_attention_heads"], json["hidden_size"] // json["num_attention_heads"]
    head_dim = values.count("attention.key_length", even) if arch.own_head_dim else even
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        values.expect(key, head_dim)
    values.expect("expert_count", 0)
    embedding = file.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding is not None else tokenizer.size
    if tokenizer.size > vocabulary:
        raise HanlinError(f"{file.path} has {tokenizer.size} tokens, but embeddings for {vocabulary}.")
    values.expect("vocab_size", vocabulary)
    json |= {
        "model_type": family,
        "vocab_size": vocabulary,
        "num_key_value_heads": values.count("attention.head_count_kv", heads),
        "rms_norm_eps": values.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_parameters": _rope(values, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    if arch.own_head_dim:
        json["head_dim"] = head_dim
    if arch.biases == "stored":
        json["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        json["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return find_family(family, "general.architecture").read(json, file.path)


class _Settings:
    """The metadata of one architecture, checked as they are read."""

    def __init__(self, file: GgufFile, family: str) -> None:
        self.file, self.family = file, family

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.family}.{key}")

    def refuse_unknown(self) -> None:
        known = {f"{self.family}.{key}" for key in {*COUNTS, *OTHERS}}
        unknown = sorted(key for key in self.file.metadata if key.startswith(f"{self.family}.") and key not in known)
        if unknown:
            raise HanlinError(f"{self.file.path}: Hanlin does not know the setting {', '.join(map(repr, unknown))}.")

    def count(self, key: str, default: int | None = None) -> int:
        found = self.get(key)
        found = default if found is None else found
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise self.refusal(key, "a whole number above 0")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        found = self.get(key)
        found = default if found is None else found
        if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found) or found <= 0:
            raise self.refusal(key, "a number above 0")
        return float(str(np.float32(found)))  # 1e-5, not the 9.999999747e-06 that single precision makes of it

    def expect(self, key: str, value: int) -> None:
        if self.get(key) not in (None, value):
            raise self.refusal(key, str(value))

    def refusal(self, key: str, expected: str) -> HanlinError:
        found = "missing" if self.get(key) is None else repr(self.get(key))
        return HanlinError(f"{self.file.path}: `{self.family}.{key}` is {found}; expected {expected}.")


def _rope(values: _Settings, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": values.real("rope.freq_base", 10_000.0)}
    kind = values.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear", "yarn"):
        raise values.refusal("rope.scaling.type", "none, linear or yarn")
    if kind != "none":
        found |= {"rope_type": kind, "factor": values.real("rope.scaling.factor")}
    if kind == "yarn":
        found["original_max_position_embeddings"] = values.count("rope.scaling.original_context_length")
    if FREQUENCIES in values.file.tensors:
        if kind != "none":
            raise values.refusal("rope.scaling.type", f"none beside {FREQUENCIES!r}")
        divisors = values.file.read(FREQUENCIES, dtype=torch.float32)
        found |= _llama3(values, divisors, head_dim, found["rope_theta"])
    return found


def _llama3(values: _Settings, divisors: Tensor, head_dim: int, theta: float) -> dict[str, Any]:
    """The rule behind divisors (head_dim / 2,): that of Llama 3.1, whose largest is its `factor`."""
    trained = values.count("rope.scaling.original_context_length", 8192)
    if divisors.shape == (head_dim // 2,) and (factor := float(divisors.max())) >= 1:
        rule = Llama3(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, trained=trained)
        expected = inverse_frequencies(head_dim, theta) / rule(head_dim, theta)[0]
        if torch.allclose(divisors, expected, rtol=1e-4):
            factors = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {"rope_type": "llama3", **factors, "original_max_position_embeddings": trained}
    raise HanlinError(
        f"{values.file.path}: the divisors in {FREQUENCIES!r} are not those of Llama 3's rule (low 1, high 4, trained "
        f"length {trained}), the only one that Hanlin finds again."
    )
