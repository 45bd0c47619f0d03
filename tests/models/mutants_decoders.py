"""Plausible mistakes in Gemma 2 and 3, Phi-3, GLM-4, GPT and BLOOM: each must break the parity."""

from dataclasses import replace

import torch
from torch import nn

from hanlin.models import Transformer
from hanlin.models.shared import Shared
from hanlin.nn.position_bias import Alibi


def zero(name: str):
    """Forget one parameter in every layer."""

    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            layer.get_parameter(name).data.zero_()

    return mutate


def one(name: str):
    """Forget a norm's weight in every layer."""

    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            layer.get_parameter(name).data.fill_(1.0)

    return mutate


def scores(**changes):
    """Other scores in every layer."""

    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            layer.self_attn.scores = replace(layer.self_attn.scores, **changes)

    return mutate


def head(**changes):
    def mutate(model: Transformer) -> None:
        model.config = replace(model.config, head=replace(model.config.head, **changes))

    return mutate


def attention(**changes):
    """What `Shared` reads from a layer's config: window, position."""

    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            a = layer.config.attention
            if changes.keys() != {"window"} or a.window is not None:
                layer.config = replace(layer.config, attention=replace(a, **changes))

    return mutate


def position(**changes):
    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            a = layer.config.attention
            layer.config = replace(layer.config, attention=replace(a, position=replace(a.position, **changes)))

    return mutate


def layers(**changes):
    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            layer.config = replace(layer.config, **changes)

    return mutate


def no_offset(model: Transformer) -> None:
    for module in model.modules():
        if getattr(module, "unit_offset", False):
            module.unit_offset = False


def no_scale(model: Transformer) -> None:
    model.model.scale = None


def swap_bases(model: Transformer) -> None:
    """Layers with a window turn by the base of those without."""
    kinds = {layer.config.attention.window is None: layer.config.attention.position for layer in model.model.layers}
    for layer in model.model.layers:
        a = layer.config.attention
        layer.config = replace(layer.config, attention=replace(a, position=kinds[a.window is not None]))


def shift_positions(model: Transformer) -> None:
    table = model.model.embed_positions.weight.data
    table.copy_(table.roll(1, 0))


def steeper(model: Transformer) -> None:
    def twice(self, q, k):
        return 2 * Alibi.__call__(self, q, k)

    class Steep(Alibi):
        __call__ = twice

    steep = Steep(model.config.layers[0].attention.heads)
    for layer in model.model.layers:
        layer._bias = (steep,)


def no_embed_norm(model: Transformer) -> None:
    model.model.embed_norm = nn.Identity()


def other_gelu(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.mlp._activate = lambda x: torch.nn.functional.silu(x)


assert Shared  # the values mutated here are those that `Shared` reads
MUTANTS = {
    "gemma2: no soft-cap of scores": ("gemma2", scores(softcap=None)),
    "gemma2: no soft-cap of logits": ("gemma2", head(softcap=None)),
    "gemma2: scale of the head": ("gemma2", scores(scale=24**-0.5)),
    "gemma2: window one too wide": ("gemma2", attention(window=7)),
    "gemma2: token vectors not scaled": ("gemma2", no_scale),
    "gemma2: norms without their 1": ("gemma2", no_offset),
    "gemma2: norm behind attention forgotten": ("gemma2", one("post_attention_layernorm.weight")),
    "gemma2: norm behind the feed-forward forgotten": ("gemma2", one("post_feedforward_layernorm.weight")),
    "gemma2: output bias": ("gemma2", zero("self_attn.o_proj.bias")),
    "gemma3: bases swapped": ("gemma3", swap_bases),
    "gemma3: key norm": ("gemma3", zero("self_attn.k_norm.weight")),
    "phi3: window one too narrow": ("phi3", attention(window=6)),
    "phi3: unscaled positions": ("phi3-long", position(scaling=None)),
    "phi3: the whole head turns": ("phi3-long", position(dim=None, scaling=None)),
    "glm: half-split pairs": ("glm", position(interleaved=False)),
    "glm4: the whole head turns": ("glm4", position(dim=None)),
    "glm4: q bias": ("glm4", zero("self_attn.q_proj.bias")),
    "glm4: norms in front only": ("glm4", one("pre_feedforward_layernorm.weight")),
    "llama 3: unscaled positions": ("llama-3", position(scaling=None)),
    "qwen3 yarn: unscaled positions": ("qwen3-yarn", position(scaling=None)),
    "gpt1: norms in front": ("gpt1", layers(norms="pre")),
    "gpt2: positions off by one": ("gpt2", shift_positions),
    "gpt2: k bias": ("gpt2-untied", zero("self_attn.v_proj.bias")),
    "gpt2: up bias": ("gpt2", zero("mlp.up_proj.bias")),
    "gpt2: norm bias": ("gpt2", zero("input_layernorm.bias")),
    "gpt3: band one too wide": ("gpt3", attention(window=6)),
    "bloom: steeper ALiBi": ("bloom", steeper),
    "bloom: no norm behind the embedding": ("bloom", no_embed_norm),
    "bloom: residual of the input": ("bloom-6-heads", layers(residual_from_norm=False)),
}
