"""Qwen 1 from its report (arXiv:2309.16609) and the names and keys of its published files."""

import math
from typing import Any

import torch
from tests.models.twin import FP32, Twin, frequencies, past, read, rms, silu, turn_halves
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "torch_dtype": "float32", "attn_dropout_prob": 0.0,
    "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 48, "intermediate_size": 144,
    "initializer_range": 0.02, "kv_channels": 12, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 64,
    "no_bias": True, "num_attention_heads": 4, "num_hidden_layers": 3, "onnx_safe": None, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 64, "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer", "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": "auto",
    "use_logn_attn": True, "vocab_size": 131,
}  # fmt: skip


class QwenTwin(Twin):
    def __init__(self, **changes: Any) -> None:
        c = CONFIG | changes
        width, hidden, biased = c["hidden_size"], c["intermediate_size"] // 2, not c["no_bias"]
        shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (c["vocab_size"], width)}
        for i in range(c["num_hidden_layers"]):
            h = f"transformer.h.{i}."
            shapes |= {f"{h}ln_1.weight": (width,), f"{h}ln_2.weight": (width,)}
            shapes |= {f"{h}attn.c_attn.weight": (3 * width, width), f"{h}attn.c_attn.bias": (3 * width,)}
            for name, out, into in (
                ("attn.c_proj", width, width), ("mlp.w1", hidden, width), ("mlp.w2", hidden, width),
                ("mlp.c_proj", width, hidden),
            ):  # fmt: skip
                shapes[f"{h}{name}.weight"] = (out, into)
                if biased:
                    shapes[f"{h}{name}.bias"] = (out,)
        shapes |= {"transformer.ln_f.weight": (width,), "lm_head.weight": (c["vocab_size"], width)}
        super().__init__(c, shapes)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.row(row) for row in ids])

    def row(self, ids: Tensor) -> Tensor:
        c, length = self.config, len(ids)
        x = self.w("transformer.wte.weight")[ids]  # (T, width)
        for i in range(c["num_hidden_layers"]):
            h = f"transformer.h.{i}."
            x = x + self.attention(h, rms(x, self.w(f"{h}ln_1.weight"), c["layer_norm_epsilon"]), length)
            y = rms(x, self.w(f"{h}ln_2.weight"), c["layer_norm_epsilon"])
            gate, up = self.linear(f"{h}mlp.w2", y), self.linear(f"{h}mlp.w1", y)
            x = x + self.linear(f"{h}mlp.c_proj", up * silu(gate))
        return rms(x, self.w("transformer.ln_f.weight"), c["layer_norm_epsilon"]) @ self.w("lm_head.weight").T

    def attention(self, h: str, x: Tensor, length: int) -> Tensor:
        c = self.config
        width, heads, D = c["hidden_size"], c["num_attention_heads"], c["kv_channels"]
        qkv = self.linear(f"{h}attn.c_attn", x)
        dim, alpha, trained = int(D * c["rotary_pct"]), 1, c["seq_length"]
        if c["use_dynamic_ntk"] and length > trained:
            alpha = 2 ** math.ceil(math.log(length / trained, 2) + 1) - 1
        inverse, positions = frequencies(dim, c["rotary_emb_base"] * alpha ** (dim / (dim - 2))), torch.arange(length)
        grown = torch.ones(length, dtype=FP32)
        if c["use_logn_attn"]:
            for n in range(trained + 1, length + 1):
                grown[n - 1] = math.log(n, trained)
        out = []
        for head in range(heads):
            at = head * D
            q, k, v = (qkv[:, part * width + at : part * width + at + D] for part in range(3))
            q = turn_halves(q, positions, inverse) * grown.to(q.dtype)[:, None]
            out.append(read(q, turn_halves(k, positions, inverse), v, past(length)))
        return self.linear(f"{h}attn.c_proj", torch.cat(out, 1))
