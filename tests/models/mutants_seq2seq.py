"""Plausible mistakes in the families with an encoder and a decoder: each must break the parity of its case."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import nn

from hanlin.models import Transformer
from hanlin.nn.feed_forward import gate_function

Mutant = Callable[[Transformer], None]


def layers_of(model: Transformer) -> list[Any]:
    assert model.encoder is not None
    return [*model.encoder.layers, *model.model.layers]


def stacks_of(model: Transformer) -> list[Any]:
    return [model.encoder, model.model]


def head(**changes: Any) -> Mutant:
    def spoil(model: Transformer) -> None:
        assert model.config.head is not None
        model.config = replace(model.config, head=replace(model.config.head, **changes))

    return spoil


def drop_head_bias(model: Transformer) -> None:
    assert model.lm_head is not None
    model.lm_head.bias = None


def tie_head(model: Transformer) -> None:
    assert model.lm_head is not None
    model.lm_head.weight = model.model.embed_tokens.weight


def scale_scores(model: Transformer) -> None:
    for layer in layers_of(model):
        layer.self_attn.scores = replace(layer.self_attn.scores, scale=layer.self_attn.head_dim**-0.5)


def scale_cross_scores(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.cross_attn.scale = layer.cross_attn.head_dim**-0.5


def turn_bias(stack: str) -> Mutant:
    """The buckets of the other direction: of an encoder's in a decoder, and of a decoder's in an encoder."""

    def spoil(model: Transformer) -> None:
        bias: Any = model.get_submodule(stack).relative_bias
        bias.bidirectional = not bias.bidirectional

    return spoil


def widen_buckets(model: Transformer) -> None:
    for stack in stacks_of(model):
        stack.relative_bias.max_distance *= 2


def share_bias(model: Transformer) -> None:
    encoder, decoder = stacks_of(model)
    decoder.relative_bias.embedding.weight = encoder.relative_bias.embedding.weight


def see_padding(model: Transformer) -> None:
    """The decoder reads all of the source."""
    for layer in model.model.layers:
        read = layer.cross_attn.forward
        layer.cross_attn.forward = lambda x, source, mask=None, read=read: read(x, source)


def swap_gate_and_up(model: Transformer) -> None:
    for layer in layers_of(model):
        gate, up = layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data
        kept = gate.clone()
        gate.copy_(up)
        up.copy_(kept)


def exact_gelu(model: Transformer) -> None:
    for layer in layers_of(model):
        layer.mlp._activate = gate_function("gelu")


def router(**changes: Any) -> Mutant:
    def spoil(model: Transformer) -> None:
        for layer in layers_of(model):
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.config = replace(layer.mlp.router.config, **changes)

    return spoil


def drop_router_bias(model: Transformer) -> None:
    for layer in layers_of(model):
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.bias = None


def stacks(name: str, value: Any) -> Mutant:
    """One attribute of both stacks."""

    def spoil(model: Transformer) -> None:
        for stack in stacks_of(model):
            setattr(stack, name, value)

    return spoil


def shift_positions(model: Transformer) -> None:
    """BART's positions begin one row too early."""
    for stack in stacks_of(model):
        stack.embed_positions.offset -= 1


def share_positions(model: Transformer) -> None:
    assert model.encoder is not None
    model.encoder.embed_positions = model.model.embed_positions


def interleave_positions(model: Transformer) -> None:
    for stack in stacks_of(model):
        stack.embed_positions.layout = "interleaved"
        stack.embed_positions._tables.clear()


def swap_norms(model: Transformer) -> None:
    """The norm of the cross-attention behind the self-attention, and the other way round."""
    for layer in model.model.layers:
        mine, other = layer.post_attention_layernorm, layer.cross_attention_layernorm
        layer.post_attention_layernorm, layer.cross_attention_layernorm = other, mine


def swap_pre_norms(model: Transformer) -> None:
    for layer in model.model.layers:
        mine, other = layer.input_layernorm, layer.cross_attention_layernorm
        layer.input_layernorm, layer.cross_attention_layernorm = other, mine


def drop_final_norm(model: Transformer) -> None:
    assert model.encoder is not None
    model.encoder.norm = None


def drop_cross_bias(name: str) -> Mutant:
    def spoil(model: Transformer) -> None:
        for layer in model.model.layers:
            projection: nn.Linear = layer.cross_attn.get_submodule(name)
            projection.bias.data.zero_()

    return spoil


def other_activation(model: Transformer) -> None:
    for layer in layers_of(model):
        layer.mlp._activate = F.relu if layer.mlp._activate is not F.relu else F.gelu


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "t5: the head reads unscaled states": ("t5", head(input_scale=1.0)),
    "t5: scores are divided": ("t5", scale_scores),
    "t5: scores of the cross-attention are divided": ("t5", scale_cross_scores),
    "t5: the decoder has the encoder's buckets": ("t5", turn_bias("model")),
    "t5: the encoder has the decoder's buckets": ("t5", turn_bias("encoder")),
    "t5: buckets reach further": ("t5", widen_buckets),
    "t5: one bias for both stacks": ("t5", share_bias),
    "t5: the decoder reads padding": ("t5", see_padding),
    "t5: norms of the decoder swapped": ("t5", swap_pre_norms),
    "t5: no norm behind the encoder": ("t5", drop_final_norm),
    "t5-v1.1: the head is the embedding": ("t5-v1.1", tie_head),
    "t5-v1.1: the head reads scaled states": ("t5-v1.1", head(input_scale=48**-0.5)),
    "t5-v1.1: gate and up swapped": ("t5-v1.1", swap_gate_and_up),
    "t5-v1.1: GELU without tanh": ("t5-v1.1", exact_gelu),
    "switch: the weight is 1": ("switch", router(renormalise=True)),
    "switch: two experts a token": ("switch", router(top_k=2)),
    "switch: the head reads unscaled states": ("switch", head(input_scale=1.0)),
    "switch-capacity: all tokens have a place": ("switch-capacity", router(capacity=None)),
    "switch-capacity: one place more": ("switch-capacity", router(capacity=4)),
    "switch-capacity: no bias of the router": ("switch-capacity", drop_router_bias),
    "bart: positions begin one row early": ("bart", shift_positions),
    "bart: one table of positions": ("bart", share_positions),
    "bart: no norm behind the embedding": ("bart", stacks("embed_norm", None)),
    "bart: no bias of the logits": ("bart", drop_head_bias),
    "bart: the decoder reads padding": ("bart", see_padding),
    "bart: norms of the decoder swapped": ("bart", swap_norms),
    "bart: no bias of the cross-attention's queries": ("bart", drop_cross_bias("q_proj")),
    "bart: no bias of the cross-attention's values": ("bart", drop_cross_bias("v_proj")),
    "bart: no bias of the cross-attention's output": ("bart", drop_cross_bias("o_proj")),
    "bart: another activation": ("bart", other_activation),
    "bart-scaled: token vectors unscaled": ("bart-scaled", stacks("scale", None)),
    "marian: token vectors unscaled": ("marian", stacks("scale", None)),
    "marian: sines and cosines by turns": ("marian", interleave_positions),
    "marian: no positions": ("marian", stacks("embed_positions", None)),
    "marian: no bias of the logits": ("marian", drop_head_bias),
}
