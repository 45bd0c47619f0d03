"""What could go wrong in Qwen 1, Baichuan and ChatGLM without a crash: each must be seen beside the twin."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hanlin.models import Transformer
from hanlin.nn.dual_chunk import log_n_scale
from hanlin.nn.masks import Causal, Prefix
from hanlin.nn.rope_scaling import DynamicNtk
from hanlin.nn.stepped_ntk import SteppedNtk

Mutate = Callable[[Transformer], None]


def without_bias(module: str) -> Mutate:
    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            layer.get_submodule(module).bias.data.zero_()

    return mutate


def swapped(first: str, second: str) -> Mutate:
    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            a, b = (layer.get_submodule(name).weight.data for name in (first, second))
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    return mutate


def layers_with(**changes: Any) -> Mutate:
    """Other values in each `LayerConfig`."""

    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            layer.config = replace(layer.config, **changes)

    return mutate


def positions_with(**changes: Any) -> Mutate:
    """Other values in each layer's rotary positions."""

    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            a = layer.config.attention
            layer.config = replace(layer.config, attention=replace(a, position=replace(a.position, **changes)))

    return mutate


def asked_with(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutate:
    """Called with other arguments than the case gives."""

    def mutate(model: Transformer) -> None:
        forward = model.forward
        model.forward = lambda ids, **how: forward(ids, **how | change(how))

    return mutate


def log_n(trained: int | None) -> Mutate:
    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            layer.self_attn.query_scale = None if trained is None else partial(log_n_scale, trained=trained)

    return mutate


def no_alibi(model: Transformer) -> None:
    for layer in model.model.layers:
        layer._bias = (None,)


def even_slopes(model: Transformer) -> None:
    for layer in model.model.layers:
        bias = layer._bias[0]
        bias.slopes = 2.0 ** (-8 / bias.heads * torch.arange(1, bias.heads + 1))


def plain_gelu(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.mlp._activate = F.gelu


def heads_apart(model: Transformer) -> None:
    """As if all queries stood first, then all keys, then all values."""
    for layer in model.model.layers:
        a = layer.self_attn
        for part in ("weight", "bias"):
            ours = [getattr(p, part).data for p in (a.q_proj, a.k_proj, a.v_proj)]
            rest = ours[0].shape[1:]
            stored = torch.stack([t.reshape(a.heads, a.head_dim, *rest) for t in ours], 1).reshape(-1, *rest)
            for target, wrong in zip(ours, stored.chunk(3), strict=True):
                target.copy_(wrong)


def key_heads_reversed(model: Transformer) -> None:
    for layer in model.model.layers:
        a = layer.self_attn
        for part in ("weight", "bias"):
            data = getattr(a.k_proj, part).data
            data.copy_(data.reshape(a.kv_heads, -1).flip(0).reshape(data.shape))


def shifted_prompt(how: dict[str, Any]) -> dict[str, Any]:
    prefix = next(part for part in how["mask"].parts if isinstance(part, Prefix))
    return {"mask": Prefix([n + 1 for n in prefix.lengths]) | Causal()}


def late_span(how: dict[str, Any]) -> dict[str, Any]:
    places, steps = how["positions"]
    return {"positions": torch.stack([places, (steps - 1).clamp(min=0)])}


DEPTH = 3
MUTANTS: dict[str, tuple[str, Mutate]] = {
    "Qwen 1 without q bias": ("qwen", without_bias("self_attn.q_proj")),
    "Qwen 1 without k bias": ("qwen", without_bias("self_attn.k_proj")),
    "Qwen 1 without v bias": ("qwen", without_bias("self_attn.v_proj")),
    "Qwen 1 without output bias": ("qwen-logn", without_bias("self_attn.o_proj")),
    "Qwen 1 without down bias": ("qwen-logn", without_bias("mlp.down_proj")),
    "Qwen 1, w1 the gate": ("qwen", swapped("mlp.gate_proj", "mlp.up_proj")),
    "Qwen 1, another base": ("qwen", positions_with(theta=10_200.0)),
    "Qwen 1, whole heads turn": ("qwen-logn", positions_with(dim=None)),
    "Qwen 1 without LogN": ("qwen-logn", log_n(None)),
    "Qwen 1, LogN a token late": ("qwen-logn", log_n(9)),
    "Qwen 1 without NTK": ("qwen-ntk", positions_with(scaling=None)),
    "Qwen 1, NTK a step short": ("qwen-ntk", positions_with(scaling=SteppedNtk(11))),
    "Qwen 1, NTK without steps": ("qwen-ntk", positions_with(scaling=DynamicNtk(2.0))),
    "Baichuan, k and v swapped": ("baichuan", swapped("self_attn.k_proj", "self_attn.v_proj")),
    "Baichuan, interleaved pairs": ("baichuan", positions_with(interleaved=True)),
    "Baichuan 13B without ALiBi": ("baichuan-13b", no_alibi),
    "Baichuan 13B, slopes as of a power of two": ("baichuan-13b", even_slopes),
    "ChatGLM, a causal prompt": ("chatglm-6b", asked_with(lambda how: {"mask": None})),
    "ChatGLM, <bos> in the prompt": ("chatglm-6b", asked_with(shifted_prompt)),
    "ChatGLM, axes swapped": ("chatglm-6b", asked_with(lambda how: {"positions": how["positions"].flip(0)})),
    "ChatGLM, span a step late": ("chatglm-6b", asked_with(late_span)),
    "ChatGLM, exact frequencies": ("chatglm-6b", positions_with(half=False)),
    "ChatGLM, residual not scaled": ("chatglm-6b", layers_with(residual_scale=1.0)),
    "ChatGLM, residual of the depth": ("chatglm-6b", layers_with(residual_scale=DEPTH**0.5)),
    "ChatGLM, residual before the norm": ("chatglm-6b", layers_with(residual_from_norm=False)),
    "ChatGLM, exact GELU": ("chatglm-6b", plain_gelu),
    "ChatGLM, heads apart": ("chatglm-6b", heads_apart),
    "ChatGLM without up bias": ("chatglm-6b", without_bias("mlp.up_proj")),
    "ChatGLM without norm bias": ("chatglm-6b", without_bias("input_layernorm")),
    "ChatGLM2, halves turn": ("chatglm2", positions_with(interleaved=False)),
    "ChatGLM2, whole heads turn": ("chatglm2", positions_with(dim=None)),
    "ChatGLM2, gate and up swapped": ("chatglm2", swapped("mlp.gate_proj", "mlp.up_proj")),
    "ChatGLM2, key heads reversed": ("chatglm2", key_heads_reversed),
    "ChatGLM2 without k bias": ("chatglm2", without_bias("self_attn.k_proj")),
    "ChatGLM2, residual before the norm": ("chatglm2-layer-norms", layers_with(residual_from_norm=False)),
    "ChatGLM2 without gate bias": ("chatglm2-layer-norms", without_bias("mlp.gate_proj")),
    "GLM-4, the base not multiplied": ("chatglm2-glm4", positions_with(theta=10_000.0)),
}
