"""What could go wrong in BERT, RoBERTa and XLNet without a crash: each must be seen beside transformers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hanlin.models import Transformer
from hanlin.nn.norms import build_norm

Mutate = Callable[[Transformer], None]


def zeroed(name: str) -> Mutate:
    """A parameter of the model, or of each layer, forgotten."""

    def mutate(model: Transformer) -> None:
        found = [p for path, p in model.named_parameters() if path.endswith(name)]
        assert found
        for parameter in found:
            parameter.data.zero_()

    return mutate


def gelu_by_tanh(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.mlp._activate = partial(F.gelu, approximate="tanh")


def head_gelu_by_tanh(model: Transformer) -> None:
    assert model.head_transform is not None
    model.head_transform.activation = partial(F.gelu, approximate="tanh")


def no_embedding_norm(model: Transformer) -> None:
    model.model.embed_norm = None


def no_head_norm(model: Transformer) -> None:
    assert model.head_transform is not None
    model.head_transform.norm = torch.nn.Identity()


def final_norm(model: Transformer) -> None:
    model.model.norm = build_norm("layer", model.config.width, 1e-12, bias=True)


def norms_in_front(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.config = replace(layer.config, norms="pre")
        layer.input_layernorm, layer.post_attention_layernorm = (
            layer.post_attention_layernorm, layer.post_feedforward_layernorm,
        )  # fmt: skip
        layer.post_feedforward_layernorm = None


def positions_from(step: int) -> Mutate:
    def mutate(model: Transformer) -> None:
        model.model.embed_positions.offset += step

    return mutate


def causal(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.config = replace(layer.config, attention=replace(layer.config.attention, bidirectional=False))


def both_ways(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.config = replace(layer.config, attention=replace(layer.config.attention, bidirectional=True))


def segments_swapped(model: Transformer) -> None:
    for layer in model.model.layers:
        layer.self_attn.seg_embed.data = layer.self_attn.seg_embed.data.flip(0)


def distances_off(change: Callable[[torch.Tensor], torch.Tensor]) -> Mutate:
    def mutate(model: Transformer) -> None:
        for layer in model.model.layers:
            original = layer.self_attn.forward

            def shifted(x: Any, distances: torch.Tensor, *rest: Any, original: Any = original, **how: Any) -> Any:
                return original(x, change(distances), *rest, **how)

            layer.self_attn.forward = shifted

    return mutate


def segments_ignored(model: Transformer) -> None:
    """As if every token were of the first segment."""
    original = model.forward

    def forward(ids: torch.Tensor, **how: Any) -> Any:
        return original(ids, **(how | {"segments": torch.zeros_like(ids)}))

    model.forward = forward


def padding_seen(model: Transformer) -> None:
    original = model.forward

    def forward(ids: torch.Tensor, **how: Any) -> Any:
        return original(ids, **(how | {"mask": None}))

    model.forward = forward


MUTANTS: dict[str, tuple[str, Mutate]] = {
    "BERT without segment vectors": ("bert-segments", zeroed("embed_segments.weight")),
    "BERT, segments ignored": ("bert-segments", segments_ignored),
    "BERT, padding seen": ("bert-padded", padding_seen),
    "BERT without the embedding's norm": ("bert", no_embedding_norm),
    "BERT without the embedding's norm bias": ("bert", zeroed("embed_norm.bias")),
    "BERT with norms in front": ("bert", norms_in_front),
    "BERT with a norm at the end": ("bert-bare", final_norm),
    "BERT that looks back only": ("bert", causal),
    "BERT with GELU's tanh form": ("bert", gelu_by_tanh),
    "BERT's head with GELU's tanh form": ("bert", head_gelu_by_tanh),
    "BERT's head without its norm": ("bert", no_head_norm),
    "BERT's head without the dense bias": ("bert", zeroed("head_transform.dense.bias")),
    "BERT's head without its bias": ("bert", zeroed("lm_head.bias")),
    "BERT without a query bias": ("bert", zeroed("q_proj.bias")),
    "BERT without an output bias": ("bert", zeroed("o_proj.bias")),
    "BERT without the second norm's bias": ("bert", zeroed("post_feedforward_layernorm.bias")),
    "RoBERTa's positions from the padding's row": ("roberta", positions_from(-1)),
    "RoBERTa's positions one too far": ("roberta-pad-0", positions_from(1)),
    "RoBERTa without the only segment": ("roberta", zeroed("embed_segments.weight")),
    "XLNet without the content bias": ("xlnet", zeroed("r_w_bias")),
    "XLNet without the distance bias": ("xlnet", zeroed("r_r_bias")),
    "XLNet without the segment bias": ("xlnet-segments", zeroed("r_s_bias")),
    "XLNet, same and other segment swapped": ("xlnet-segments", segments_swapped),
    "XLNet, segments ignored": ("xlnet-segments", segments_ignored),
    "XLNet's distances one off": ("xlnet", distances_off(lambda table: table.roll(1, 0))),
    "XLNet's distances backwards": ("xlnet", distances_off(lambda table: table.flip(0))),
    "XLNet's cosines first": ("xlnet", distances_off(lambda table: table.roll(table.shape[1] // 2, 1))),
    "XLNet uni that looks both ways": ("xlnet-uni", both_ways),
    "XLNet bi that looks back only": ("xlnet", causal),
    "XLNet without its head's bias": ("xlnet", zeroed("lm_head.bias")),
}
