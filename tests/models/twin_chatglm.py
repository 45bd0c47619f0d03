"""ChatGLM-6B from GLM (arXiv:2103.10360), GLM-130B (arXiv:2210.02414) and the names and keys of its published files."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tests.models.twin import FP32, Twin, frequencies, layer_norm, turn_halves
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "torch_dtype": "float32", "bos_token_id": 124,
    "eos_token_id": 125, "mask_token_id": 120, "gmask_token_id": 121, "pad_token_id": 3, "hidden_size": 64,
    "inner_hidden_size": 112, "layernorm_epsilon": 1e-5, "max_sequence_length": 128, "num_attention_heads": 2,
    "num_layers": 3, "position_encoding_2d": True, "use_cache": True, "vocab_size": 131, "quantization_bit": 0,
    "pre_seq_len": None, "prefix_projection": False,
}  # fmt: skip


class ChatGlmTwin(Twin):
    def __init__(self, **changes: Any) -> None:
        c = CONFIG | changes
        width, hidden = c["hidden_size"], c["inner_hidden_size"]
        shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (c["vocab_size"], width)}
        for i in range(c["num_layers"]):
            h = f"transformer.layers.{i}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes |= {f"{h}{name}.weight": (width,), f"{h}{name}.bias": (width,)}
            for name, out, into in (
                ("attention.query_key_value", 3 * width, width), ("attention.dense", width, width),
                ("mlp.dense_h_to_4h", hidden, width), ("mlp.dense_4h_to_h", width, hidden),
            ):  # fmt: skip
                shapes |= {f"{h}{name}.weight": (out, into), f"{h}{name}.bias": (out,)}
        shapes |= {f"transformer.final_layernorm.{part}": (width,) for part in ("weight", "bias")}
        if not c.get("tie_word_embeddings", True):
            shapes["lm_head.weight"] = (c["vocab_size"], width)
        super().__init__(c, shapes)

    def stored(self) -> dict[str, Tensor]:
        """The published files hold a tied head twice, and each layer's frequencies."""
        held = super().stored()
        held.setdefault("lm_head.weight", held["transformer.word_embeddings.weight"].clone())
        for i in range(self.config["num_layers"]):
            held[f"transformer.layers.{i}.attention.rotary_emb.inv_freq"] = torch.zeros(3, dtype=torch.float16)
        return held

    def forward(self, ids: Tensor, starts: Sequence[int], blanks: Sequence[int]) -> Tensor:
        """starts: where <bos> stands in each row, blanks: where its [gMASK] or [MASK] stands."""
        return torch.stack([self.row(*each) for each in zip(ids, starts, blanks, strict=True)])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, self.w(f"{name}.weight"), self.w(f"{name}.bias"), self.config["layernorm_epsilon"])

    def row(self, ids: Tensor, start: int, blank: int) -> Tensor:
        c, length = self.config, len(ids)
        visible = torch.zeros(length, length, dtype=torch.bool)
        for query in range(length):
            for key in range(length):
                visible[query, key] = key <= query or key < start
        places = torch.tensor([p if p < start else blank for p in range(length)])
        steps = torch.tensor([0 if p < start else p - start + 1 for p in range(length)])
        alpha = math.sqrt(2 * c["num_layers"])
        x = self.w("transformer.word_embeddings.weight")[ids]
        for i in range(c["num_layers"]):
            h = f"transformer.layers.{i}."
            y = self.norm(f"{h}input_layernorm", x)
            x = alpha * y + self.attention(i, y, visible, places, steps)
            y = self.norm(f"{h}post_attention_layernorm", x)
            z = self.linear(f"{h}mlp.dense_h_to_4h", y)
            z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * z * (1 + 0.044715 * z * z)))
            x = alpha * y + self.linear(f"{h}mlp.dense_4h_to_h", z)
        head = "transformer.word_embeddings" if c.get("tie_word_embeddings", True) else "lm_head"
        return self.norm("transformer.final_layernorm", x) @ self.w(f"{head}.weight").T

    def attention(self, layer: int, x: Tensor, visible: Tensor, places: Tensor, steps: Tensor) -> Tensor:
        c, h = self.config, f"transformer.layers.{layer}."
        heads = c["num_attention_heads"]
        D = c["hidden_size"] // heads
        inverse = frequencies(D // 2, 10_000.0).half().to(FP32)
        mixed, out = self.linear(f"{h}attention.query_key_value", x), []
        for head in range(heads):
            q, k, v = mixed[:, 3 * D * head : 3 * D * (head + 1)].chunk(3, 1)
            q, k = (
                torch.cat(
                    [turn_halves(t[:, : D // 2], places, inverse), turn_halves(t[:, D // 2 :], steps, inverse)], 1
                )
                for t in (q, k)
            )
            # published code divides by the layer's number and multiplies it back in fp32
            scores = (q / (math.sqrt(D) * (layer + 1))) @ k.T
            scores = scores.masked_fill(~visible, -10_000.0) * (layer + 1)
            out.append(torch.softmax(scores, -1) @ v)
        return self.linear(f"{h}attention.dense", torch.cat(out, 1))
