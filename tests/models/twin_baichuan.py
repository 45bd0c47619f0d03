"""Baichuan 7B (rotary) and 13B (ALiBi, arXiv:2108.12409): Llama's layer with `W_pack`, by published names and keys."""

import math
from typing import Any

import torch
from tests.models.twin import Twin, frequencies, past, read, rms, silu, turn_halves
from torch import Tensor

SHARED: dict[str, Any] = {
    "model_type": "baichuan", "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_act": "silu", "initializer_range": 0.02, "intermediate_size": 72, "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 131,
}  # fmt: skip
SEVEN = SHARED | {
    "architectures": ["BaiChuanForCausalLM"],
    "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
THIRTEEN = SHARED | {
    "architectures": ["BaichuanForCausalLM"], "_from_model_config": True, "gradient_checkpointing": False,
    "hidden_size": 48, "num_attention_heads": 6, "model_max_length": 64,
}  # fmt: skip


def slopes(heads: int) -> list[float]:
    """A geometric row for a power of two; else that of the next lower one, and every second one of the next higher."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8 * (i + 1) / heads) for i in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower) + slopes(2 * lower)[::2][: heads - lower]


class BaichuanTwin(Twin):
    def __init__(self, base: dict[str, Any], **changes: Any) -> None:
        c = base | changes
        width, hidden = c["hidden_size"], c["intermediate_size"]
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], width)}
        for i in range(c["num_hidden_layers"]):
            h = f"model.layers.{i}."
            shapes |= {f"{h}input_layernorm.weight": (width,), f"{h}post_attention_layernorm.weight": (width,)}
            shapes |= {f"{h}self_attn.W_pack.weight": (3 * width, width), f"{h}self_attn.o_proj.weight": (width, width)}
            shapes |= {f"{h}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
            shapes[f"{h}mlp.down_proj.weight"] = (width, hidden)
        shapes["model.norm.weight"] = (width,)
        if not c["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (c["vocab_size"], width)
        super().__init__(c, shapes)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.row(row) for row in ids])

    def row(self, ids: Tensor) -> Tensor:
        c, eps = self.config, self.config["rms_norm_eps"]
        x = self.w("model.embed_tokens.weight")[ids]
        for i in range(c["num_hidden_layers"]):
            h = f"model.layers.{i}."
            x = x + self.attention(h, rms(x, self.w(f"{h}input_layernorm.weight"), eps))
            y = rms(x, self.w(f"{h}post_attention_layernorm.weight"), eps)
            gate = silu(self.linear(f"{h}mlp.gate_proj", y))
            x = x + self.linear(f"{h}mlp.down_proj", gate * self.linear(f"{h}mlp.up_proj", y))
        head = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
        return rms(x, self.w("model.norm.weight"), eps) @ self.w(f"{head}.weight").T

    def attention(self, h: str, x: Tensor) -> Tensor:
        c, length = self.config, len(x)
        heads, width = c["num_attention_heads"], c["hidden_size"]
        D, positions = width // heads, torch.arange(length)
        packed, out = self.linear(f"{h}self_attn.W_pack", x), []
        for head in range(heads):
            q, k, v = (packed[:, part * width + head * D : part * width + (head + 1) * D] for part in range(3))
            bias: Tensor | float = 0.0
            if "max_position_embeddings" in c:
                q, k = (turn_halves(each, positions, frequencies(D, 10_000.0)) for each in (q, k))
            else:
                bias = positions.to(x.dtype)[None] * slopes(heads)[head]  # of the key's place, as BLOOM has it
            out.append(read(q, k, v, past(length), bias))
        return self.linear(f"{h}self_attn.o_proj", torch.cat(out, 1))
