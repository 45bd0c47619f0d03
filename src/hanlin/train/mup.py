"""Width transfer: a rate found on a narrow model, used on a wide one (muP; Tensor Programs V, arXiv:2203.03466).

With m = width / base width, and all inner widths (heads, feed-forward, ranks) growing with it, Adam's rule is

                        input, bias, norm      hidden matrix        output
    initial std         s                      s / sqrt(m)          s, and what leaves the head is divided by m
    learning rate       lr                     lr / m               lr                                  (table 8)
    scores              q . k / d              instead of / sqrt(d), where heads get wider              (definition 4.1)

Nothing here is a change of the model: a factor f on a tensor that is multiplied into the result equals a factor f on
its initial value *and* on its rate, since Adam's steps know no scale (appendix J.2.1). So the 1/m of the output stands
in the last norm's weight, and sqrt(d_base / d) of the scores in the query projection (or the queries' norm), and the
folder is that of any model of its family. A router's logits are few: std s / m, rate lr / m.

The decay that AdamW applies is rate * decay; to keep it, `decay` is m where the rate is lr / m.
At m = 1 every factor is 1. Factors are for Adam: SGD's, Muon's and Adafactor's are others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ModelConfig, RelativeAttentionConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import Router

TABLES = ("embed_tokens.weight", "embed_positions.weight", "embed_segments.weight", "lm_head.weight")


@dataclass(frozen=True)
class Scale:
    """Factors of one parameter. lr: on the recipe's rate; init: on its initial value (of a matrix: on the standard
    deviation `config.init_std`); decay: on the recipe's weight decay, where it decays at all."""

    lr: float = 1.0
    init: float = 1.0
    decay: float = 1.0


def width_scales(config: ModelConfig, base_width: int, *, base_head_dim: int | None = None) -> dict[str, Scale]:
    """{parameter's name: factors} of a model of this config. base_head_dim: width of a head at the base width, where it
    is another one; None: heads are as wide, and more of them.

    `HanlinError` with the setting's name for a model to which the table does not apply as it stands.
    """
    _refuse(config, base_width, base_head_dim)
    with torch.device("meta"):
        model = Transformer(config)
    routed = {
        f"{name}.{label}"
        for name, module in model.named_modules()
        if isinstance(module, Router)
        for label, p in module.named_parameters()
        if p.ndim > 1
    }
    return {
        name: _scale(name, parameter.ndim, name in routed, config, base_width, base_head_dim)
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def scale_weights(model: Transformer, scales: Mapping[str, Scale]) -> None:
    """Multiply the initial values of a model that was just made. Once: a second time it would be done twice."""
    for name, parameter in model.named_parameters():
        factor = scales[name].init
        if factor == 1.0:
            continue
        if model.config.norm.unit_offset and _is_norm(name):  # stored as what it differs from 1
            parameter.add_(1).mul_(factor).sub_(1)
        else:
            parameter.mul_(factor)


def split_by_scale(named: Mapping[str, nn.Parameter], scales: Mapping[str, Scale]) -> dict[Scale, list[nn.Parameter]]:
    """Parameters (or pieces of them) that share a rate and a decay: one group of an optimiser each. The `init` of the
    keys is 1: it has been applied."""
    found: dict[Scale, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        found.setdefault(replace(scales[name], init=1.0), []).append(parameter)
    return found


def _scale(
    name: str, dimensions: int, routed: bool, config: ModelConfig, base: int, base_head_dim: int | None
) -> Scale:
    m = config.width / base
    if _feeds_the_head(name):
        return Scale(lr=1 / m, init=1 / m)
    matrix = dimensions > 1 and not name.endswith(("bias", "relative_bias.weight", *TABLES))
    scale = Scale() if not matrix else Scale(1 / m, 1 / m if routed else m**-0.5, m)
    parts = name.split(".")
    owner, normed = parts[-2] if len(parts) > 1 else "", _normed_queries(config)
    if base_head_dim is not None and owner == ("q_norm" if normed else "q_proj") and "self_attn" in parts:
        factor = (base_head_dim / _head_dim(config)) ** 0.5
        return Scale(scale.lr * factor, scale.init * factor, scale.decay / factor)
    return scale


def _feeds_the_head(name: str) -> bool:
    """The norms whose output the head multiplies: the last one, and those of further predictions."""
    parts = name.split(".")
    return parts[:2] == ["model", "norm"] or (parts[:2] == ["ahead", "steps"] and parts[3] == "norm")


def _is_norm(name: str) -> bool:
    return name.endswith(("norm.weight", "layernorm.weight"))


def _head_dim(config: ModelConfig) -> int:
    attention = config.layers[0].attention
    assert isinstance(attention, AttentionConfig)
    return attention.head_dim


def _normed_queries(config: ModelConfig) -> bool:
    attention = config.layers[0].attention
    return isinstance(attention, AttentionConfig) and attention.qk_norm


def _refuse(config: ModelConfig, base_width: int, base_head_dim: int | None) -> None:
    if base_width < 1:
        raise HanlinError(
            f"train.mup_base_width is {base_width}, expected the width of the model the rate was found on."
        )
    head, layers = config.head, (*config.layers, *config.encoder)
    reason = None
    if head is None or not config.norm.final:
        reason = "it has no last norm with an output head behind it"
    elif head.transform is not None:
        reason = f"its head has a transform ({head.transform}) of its own"
    elif head.input_scale != 1:
        reason = f"its head scales by {head.input_scale:g}, which the family derives from the width"
    elif config.embedding.scale is not None:
        reason = f"its embedding is scaled by {config.embedding.scale:g}, which the family derives from the width"
    elif any(isinstance(layer.attention, RelativeAttentionConfig) for layer in layers):
        reason = "its layers use relative attention"
    elif base_head_dim is not None:
        kinds = {(type(a), getattr(a, "head_dim", 0), getattr(a, "qk_norm", None), getattr(a, "l2_norm", None)) for a in
                 (layer.attention for layer in layers)}  # fmt: skip
        if len(kinds) > 1 or not isinstance(layers[0].attention, AttentionConfig) or layers[0].attention.l2_norm:
            reason = "its layers do not all have the plain heads that base_head_dim speaks of"
    if reason is not None:
        raise HanlinError(
            f"Width transfer (train.mup_base_width) does not apply to this model ({config.family}): {reason}. Leave it "
            "out, or take a family such as llama or qwen3."
        )
