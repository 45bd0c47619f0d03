"""Plausible mistakes in the families with experts: name -> (case, what spoils a loaded model in place)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from hanlin.models import Transformer
from hanlin.models.layer import Layer
from hanlin.nn.attention import Attention
from hanlin.nn.experts import MixtureOfExperts
from hanlin.nn.feed_forward import gate_function
from hanlin.nn.latent_attention import LatentAttention

Mutant = tuple[str, Callable[[Transformer], None]]


def layers(model: Transformer) -> Iterator[tuple[int, Layer]]:
    return ((i, layer) for i, layer in enumerate(model.model.layers) if isinstance(layer, Layer))


def experts(model: Transformer) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def zero(suffix: str) -> Callable[[Transformer], None]:
    """Every parameter or buffer of that name is forgotten."""

    def spoil(model: Transformer) -> None:
        found = [t for name, t in model.state_dict().items() if name.endswith(suffix)]
        assert found, suffix
        for tensor in found:
            tensor.zero_()

    return spoil


def one(suffix: str) -> Callable[[Transformer], None]:
    """Every norm of that name loses its weight."""

    def spoil(model: Transformer) -> None:
        found = [t for name, t in model.state_dict().items() if name.endswith(suffix)]
        assert found, suffix
        for tensor in found:
            tensor.fill_(1.0)

    return spoil


def router(**changes: Any) -> Callable[[Transformer], None]:
    def spoil(model: Transformer) -> None:
        for block in experts(model):
            block.router.config = replace(block.router.config, **changes)

    return spoil


def attention(**changes: Any) -> Callable[[Transformer], None]:
    """The layers' configs, which the masks and the rotary tables of a pass without a cache are made from."""

    def spoil(model: Transformer) -> None:
        for _, layer in layers(model):
            layer.config = replace(layer.config, attention=replace(layer.config.attention, **changes))

    return spoil


def rope(**changes: Any) -> Callable[[Transformer], None]:
    def spoil(model: Transformer) -> None:
        for _, layer in layers(model):
            a = layer.config.attention
            if a.position is not None:
                position = replace(a.position, **changes)
                layer.config = replace(layer.config, attention=replace(a, position=position))

    return spoil


def wider(step: int) -> Callable[[Transformer], None]:
    def spoil(model: Transformer) -> None:
        for _, layer in layers(model):
            a = layer.config.attention
            if a.window is not None:
                layer.config = replace(layer.config, attention=replace(a, window=a.window + step))

    return spoil


def other_chunk(model: Transformer) -> None:
    for _, layer in layers(model):
        a = layer.config.attention
        if a.chunk is not None:
            layer.config = replace(layer.config, attention=replace(a, chunk=a.chunk + 1))


def swap_gate_and_up(model: Transformer) -> None:
    for block in experts(model):
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            weight = getattr(block.experts, name, None)
            if weight is not None:
                gate, up = weight.data.chunk(2, dim=1)
                weight.data = torch.cat([up, gate], 1)


def weigh_outputs(model: Transformer) -> None:
    for block in experts(model):
        block.experts.scale_input = False


def no_shared_expert(model: Transformer) -> None:
    for block in experts(model):
        block.shared = None


def no_shared_gate(model: Transformer) -> None:
    for block in experts(model):
        block.shared_gate = None


def gate(limit: float | None) -> Callable[[Transformer], None]:
    def spoil(model: Transformer) -> None:
        for block in experts(model):
            block.experts._activate = gate_function("silu", limit=limit)

    return spoil


def no_sinks(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.sinks = None


def scale_of_the_head(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.scores = replace(module.scores, scale=(module.nope_dim + module.rope_dim) ** -0.5)


def norm_everywhere(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.l2_norm = 1e-5


def no_l2_norm(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.l2_norm = None


def no_temperature(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.query_scale = None


def turn_everywhere(model: Transformer) -> None:
    first = next(layer.config.attention.position for _, layer in layers(model))
    attention(position=first)(model)


def plain_frequencies(model: Transformer) -> None:
    rope(scaling=None)(model)


def whole_pairs(model: Transformer) -> None:
    """YaRN's ramp rounded to whole pairs."""
    for _, layer in layers(model):
        a = layer.config.attention
        scaling = replace(a.position.scaling, truncate=True)
        layer.config = replace(layer.config, attention=replace(a, position=replace(a.position, scaling=scaling)))


MUTANTS: dict[str, Mutant] = {
    "Mixtral: weights not divided by their sum": ("mixtral", router(renormalise=False)),
    "Mixtral: one expert too few": ("mixtral-window", router(top_k=2)),
    "Mixtral: gate and up of experts swapped": ("mixtral", swap_gate_and_up),
    "Mixtral: window one too wide": ("mixtral-window", wider(1)),
    "Mixtral: window one too narrow": ("mixtral-window", wider(-1)),
    "Qwen2-MoE: weights divided by their sum": ("qwen2-moe", router(renormalise=True)),
    "Qwen2-MoE: no shared expert": ("qwen2-moe", no_shared_expert),
    "Qwen2-MoE: shared expert without its gate": ("qwen2-moe", no_shared_gate),
    "Qwen2-MoE: no bias of keys": ("qwen2-moe", zero("k_proj.bias")),
    "Qwen2-MoE: window one too wide": ("qwen2-moe-step", wider(1)),
    "Qwen3-MoE: weights not divided by their sum": ("qwen3-moe", router(renormalise=False)),
    "Qwen3-MoE: no weight of the query norm": ("qwen3-moe", one("q_norm.weight")),
    "Qwen3-MoE: window one too narrow": ("qwen3-moe-window", wider(-1)),
    "DeepSeek: weights divided by their sum": ("deepseek-moe", router(renormalise=True)),
    "DeepSeek: no shared expert": ("deepseek-moe", no_shared_expert),
    "DeepSeek: one expert too many": ("deepseek-moe-step", router(top_k=4)),
    "DeepSeek-V2: no groups": ("deepseek-v2", router(groups=1, top_groups=1)),
    "DeepSeek-V2: groups by two experts": ("deepseek-v2", router(group_score="top2")),
    "DeepSeek-V2: weights not scaled": ("deepseek-v2", router(scale=1.0)),
    "DeepSeek-V2: scale without YaRN's part": ("deepseek-v2", scale_of_the_head),
    "DeepSeek-V2: half-split pairs": ("deepseek-v2", rope(interleaved=False)),
    "DeepSeek-V2: frequencies not scaled": ("deepseek-v2", plain_frequencies),
    "DeepSeek-V2: no weight of the latent's norm": ("deepseek-v2", one("kv_a_layernorm.weight")),
    "DeepSeek-V2: no weight of the query latent's norm": ("deepseek-v2", one("q_a_layernorm.weight")),
    "DeepSeek-V2 Lite: no bias into the latent": ("deepseek-v2-lite", zero("kv_a_proj_with_mqa.bias")),
    "DeepSeek-V3: no correction": ("deepseek-v3", zero("router.correction")),
    "DeepSeek-V3: groups by their best expert": ("deepseek-v3", router(group_score="max")),
    "DeepSeek-V3: weights not divided by their sum": ("deepseek-v3", router(renormalise=False)),
    "DeepSeek-V3: softmax scores": ("deepseek-v3", router(kind="softmax")),
    "DeepSeek-V3: scale without YaRN's part": ("deepseek-v3", scale_of_the_head),
    "DeepSeek-V3: interleaved pairs": ("deepseek-v3-halves", rope(interleaved=True)),
    "Llama 4: weights scale what comes out": ("llama4", weigh_outputs),
    "Llama 4: chunks of another size": ("llama4", other_chunk),
    "Llama 4: no chunks": ("llama4", attention(chunk=None)),
    "Llama 4: no norm after the turn": ("llama4", no_l2_norm),
    "Llama 4: that norm in all layers": ("llama4", norm_everywhere),
    "Llama 4: no temperature": ("llama4", no_temperature),
    "Llama 4: positions in all layers": ("llama4", turn_everywhere),
    "Llama 4: half-split pairs": ("llama4", rope(interleaved=False)),
    "Llama 4: softmax scores": ("llama4-maverick", router(kind="softmax")),
    "Llama 4: no bias of the output": ("llama4-biases", zero("o_proj.bias")),
    "gpt-oss: no sinks": ("gpt-oss", no_sinks),
    "gpt-oss: no clamp": ("gpt-oss", gate(limit=100.0)),
    "gpt-oss: plain SwiGLU": ("gpt-oss", gate(limit=None)),
    "gpt-oss: gate and up of experts swapped": ("gpt-oss", swap_gate_and_up),
    "gpt-oss: no bias of the router": ("gpt-oss", zero("router.bias")),
    "gpt-oss: no bias of gate and up": ("gpt-oss", zero("gate_up_proj_bias")),
    "gpt-oss: no bias of down": ("gpt-oss", zero("down_proj_bias")),
    "gpt-oss: softmax over all experts": ("gpt-oss", router(kind="softmax", renormalise=False)),
    "gpt-oss: YaRN rounded to whole pairs": ("gpt-oss", whole_pairs),
    "gpt-oss: window one too wide": ("gpt-oss", wider(1)),
    "gpt-oss: windows in all layers": ("gpt-oss", attention(window=6)),
}  # fmt: skip
