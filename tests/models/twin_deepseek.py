"""DeepSeekMoE from its report (arXiv:2401.06066, equations 3 to 11) and the names and keys of its published files:
every token and every one of its experts by itself."""

from typing import Any

import torch
from tests.models.twin import Twin, frequencies, past, read, rms, silu, turn_halves
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "torch_dtype": "float32",
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 80, "max_position_embeddings": 64, "moe_intermediate_size": 16,
    "moe_layer_freq": 1, "n_routed_experts": 8, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 4, "num_experts_per_tok": 3, "num_hidden_layers": 3, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000, "scoring_func": "softmax",
    "seq_aux": True, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 131,
}  # fmt: skip


class DeepseekTwin(Twin):
    def __init__(self, **changes: Any) -> None:
        c = CONFIG | changes
        width = c["hidden_size"]
        D = width // c["num_attention_heads"]
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], width)}
        for i in range(c["num_hidden_layers"]):
            h = f"model.layers.{i}."
            shapes |= {f"{h}input_layernorm.weight": (width,), f"{h}post_attention_layernorm.weight": (width,)}
            for name in "qkv":
                heads = c["num_attention_heads" if name == "q" else "num_key_value_heads"]
                shapes[f"{h}self_attn.{name}_proj.weight"] = (heads * D, width)
                if c["attention_bias"]:
                    shapes[f"{h}self_attn.{name}_proj.bias"] = (heads * D,)
            shapes[f"{h}self_attn.o_proj.weight"] = (width, width)
            if c["attention_bias"]:
                shapes[f"{h}self_attn.o_proj.bias"] = (width,)
            blocks = {f"{h}mlp.": c["intermediate_size"]}
            if has_experts(c, i):
                shapes[f"{h}mlp.gate.weight"] = (c["n_routed_experts"], width)
                blocks = {f"{h}mlp.experts.{e}.": c["moe_intermediate_size"] for e in range(c["n_routed_experts"])}
                if c["n_shared_experts"]:
                    blocks[f"{h}mlp.shared_experts."] = c["n_shared_experts"] * c["moe_intermediate_size"]
            for block, hidden in blocks.items():
                shapes |= {f"{block}gate_proj.weight": (hidden, width), f"{block}up_proj.weight": (hidden, width)}
                shapes[f"{block}down_proj.weight"] = (width, hidden)
        shapes |= {"model.norm.weight": (width,), "lm_head.weight": (c["vocab_size"], width)}
        super().__init__(c, shapes)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.row(row) for row in ids])

    def row(self, ids: Tensor) -> Tensor:
        eps = self.config["rms_norm_eps"]
        x = self.w("model.embed_tokens.weight")[ids]  # (T, width)
        for i in range(self.config["num_hidden_layers"]):
            h = f"model.layers.{i}."
            x = x + self.attention(f"{h}self_attn.", rms(x, self.w(f"{h}input_layernorm.weight"), eps))
            y = rms(x, self.w(f"{h}post_attention_layernorm.weight"), eps)
            sparse = has_experts(self.config, i)
            x = x + (torch.stack([self.token(f"{h}mlp.", u) for u in y]) if sparse else self.dense(f"{h}mlp.", y))
        return rms(x, self.w("model.norm.weight"), eps) @ self.w("lm_head.weight").T

    def attention(self, h: str, x: Tensor) -> Tensor:
        c, length = self.config, len(x)
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        D = c["hidden_size"] // heads
        q, k, v = (self.linear(f"{h}{name}_proj", x).split(D, 1) for name in "qkv")
        inverse, positions = frequencies(D, c["rope_theta"]), torch.arange(length)
        k = [turn_halves(part, positions, inverse) for part in k]
        q = [turn_halves(part, positions, inverse) for part in q]
        groups = heads // kv_heads
        out = [read(q[n], k[n // groups], v[n // groups], past(length)) for n in range(heads)]
        return self.linear(f"{h}o_proj", torch.cat(out, 1))

    def dense(self, h: str, x: Tensor) -> Tensor:
        return self.linear(f"{h}down_proj", silu(self.linear(f"{h}gate_proj", x)) * self.linear(f"{h}up_proj", x))

    def token(self, h: str, u: Tensor) -> Tensor:
        """One token (width,) through the experts it prefers and those that all share."""
        c = self.config
        affinity = torch.softmax(self.w(f"{h}gate.weight") @ u, 0)
        order = sorted(enumerate(affinity.tolist()), key=lambda pair: -pair[1])
        chosen = [e for e, _ in order[: c["num_experts_per_tok"]]]
        total = sum(affinity[e] for e in chosen) if c["norm_topk_prob"] and len(chosen) > 1 else 1.0
        y = self.dense(f"{h}shared_experts.", u) if c["n_shared_experts"] else torch.zeros_like(u)
        for e in chosen:
            y = y + affinity[e] / total * self.dense(f"{h}experts.{e}.", u)
        return y


def has_experts(c: dict[str, Any], layer: int) -> bool:
    routed = c["n_routed_experts"] is not None
    return routed and layer >= c["first_k_dense_replace"] and layer % c["moe_layer_freq"] == 0
