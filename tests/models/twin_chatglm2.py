"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B (arXiv:2406.12793) from the names and keys of their published files."""

from typing import Any

import torch
from tests.models.twin import Twin, frequencies, layer_norm, past, read, rms, silu, turn_pairs
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "torch_dtype": "float32", "add_bias_linear": False,
    "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 72,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 48, "kv_channels": 16,
    "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 4,
    "num_layers": 3, "original_rope": True, "padded_vocab_size": 131, "post_layer_norm": True, "rmsnorm": True,
    "seq_length": 64, "use_cache": True, "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class ChatGlm2Twin(Twin):
    def __init__(self, **changes: Any) -> None:
        c = CONFIG | changes
        width, hidden, biased = c["hidden_size"], c["ffn_hidden_size"], c["add_bias_linear"]
        inner, groups = c["kv_channels"] * c["num_attention_heads"], c["kv_channels"] * c["multi_query_group_num"]
        norms = ("weight",) if c["rmsnorm"] else ("weight", "bias")
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.embedding.word_embeddings.weight": (c["padded_vocab_size"], width)
        }
        for i in range(c["num_layers"]):
            h = f"transformer.encoder.layers.{i}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes |= {f"{h}{name}.{part}": (width,) for part in norms}
            for name, out, into, bias in (
                ("self_attention.query_key_value", inner + 2 * groups, width, biased or c["add_qkv_bias"]),
                ("self_attention.dense", width, inner, biased),
                ("mlp.dense_h_to_4h", 2 * hidden, width, biased),
                ("mlp.dense_4h_to_h", width, hidden, biased),
            ):
                shapes[f"{h}{name}.weight"] = (out, into)
                if bias:
                    shapes[f"{h}{name}.bias"] = (out,)
        if c["post_layer_norm"]:
            shapes |= {f"transformer.encoder.final_layernorm.{part}": (width,) for part in norms}
        shapes["transformer.output_layer.weight"] = (c["padded_vocab_size"], width)
        super().__init__(c, shapes)

    def stored(self) -> dict[str, Tensor]:
        return super().stored() | {"transformer.rotary_pos_emb.inv_freq": torch.zeros(4, dtype=torch.float16)}

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.row(row) for row in ids])

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps = self.config["layernorm_epsilon"]
        if self.config["rmsnorm"]:
            return rms(x, self.w(f"{name}.weight"), eps)
        return layer_norm(x, self.w(f"{name}.weight"), self.w(f"{name}.bias"), eps)

    def row(self, ids: Tensor) -> Tensor:
        c = self.config
        after = c["apply_residual_connection_post_layernorm"]
        x = self.w("transformer.embedding.word_embeddings.weight")[ids]
        for i in range(c["num_layers"]):
            h = f"transformer.encoder.layers.{i}."
            y = self.norm(f"{h}input_layernorm", x)
            x = (y if after else x) + self.attention(h, y)
            y = self.norm(f"{h}post_attention_layernorm", x)
            gate, up = self.linear(f"{h}mlp.dense_h_to_4h", y).chunk(2, 1)
            x = (y if after else x) + self.linear(f"{h}mlp.dense_4h_to_h", silu(gate) * up)
        if c["post_layer_norm"]:
            x = self.norm("transformer.encoder.final_layernorm", x)
        return x @ self.w("transformer.output_layer.weight").T

    def attention(self, h: str, x: Tensor) -> Tensor:
        c, length = self.config, len(x)
        D, heads, groups = c["kv_channels"], c["num_attention_heads"], c["multi_query_group_num"]
        inverse = frequencies(D // 2, 10_000.0 * c.get("rope_ratio", 1))
        heads_of = self.linear(f"{h}self_attention.query_key_value", x).split(D, 1)  # every query, key and value head
        positions, out = torch.arange(length), []
        for head in range(heads):
            group = head // (heads // groups)
            q, k, v = heads_of[head], heads_of[heads + group], heads_of[heads + groups + group]
            q, k = turn_pairs(q, positions, inverse), turn_pairs(k, positions, inverse)
            out.append(read(q, k, v, past(length)))
        return self.linear(f"{h}self_attention.dense", torch.cat(out, 1))
