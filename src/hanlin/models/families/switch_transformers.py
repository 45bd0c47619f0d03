"""Switch Transformers (arXiv:2101.03961): T5 v1.0 with experts in every `encoder_sparse_step`-th layer of the encoder
and every `decoder_sparse_step`-th of the decoder. A token goes to one expert, weighed by its share of the softmax; an
expert takes `expert_capacity` tokens of a row and gives zeros to the rest.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ExpertsConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hanlin.models.families.encoder_decoder import with_encoder
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, known_activation, read_count
from hanlin.models.families.t5 import (
    ALWAYS,
    BUCKETS,
    DISTANCE,
    NOTES,
    SIZES,
    SKIPPED,
    all_weights,
    fill_positions,
    say_stacks,
)
from hanlin.models.families.weights import Rule, stacked

Stack = tuple[LayerConfig, ...]


def fill(values: Values, json: Mapping[str, Any]) -> None:
    """T5's positions, and the factor in front of a head that shares the embedding."""
    fill_positions(values, json, depth=12)
    values["head.input_scale"] = values["width"] ** -0.5


def is_sparse(index: int, step: int) -> bool:
    """Whether a layer has experts: the second of each `step`, all for 1, none for 0."""
    return step > 0 and (step == 1 or index % step == 1)


def shape(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
    """The encoder beside the decoder; in both, layers without experts get a plain feed-forward of the same sizes."""
    config = with_encoder(config, read_count(json, "num_layers", 12))
    decoder, encoder = (
        _thin_out(stack, json, name) for stack, name in ((config.layers, "decoder"), (config.encoder, "encoder"))
    )
    return replace(config, layers=decoder, encoder=encoder)


def _thin_out(stack: Stack, json: Mapping[str, Any], name: str) -> Stack:
    depth, sparse = len(stack), read_count(json, f"num_sparse_{name}_layers", 3, least=0)
    step = read_count(json, f"{name}_sparse_step", depth // sparse if sparse else depth, least=0)
    f = stack[0].feed_forward
    dense = replace(stack[0], feed_forward=FeedForwardConfig(f.hidden, activation=f.activation, gated=False))
    return tuple(layer if is_sparse(index, step) else dense for index, layer in enumerate(stack))


def describe(config: ModelConfig) -> dict[str, Any]:
    """Where the experts are."""
    return say_stacks(config) | _say_step(config.layers, "decoder") | _say_step(config.encoder, "encoder")


def _say_step(stack: Stack, name: str) -> dict[str, Any]:
    found = [isinstance(layer.feed_forward, ExpertsConfig) for layer in stack]
    for step in range(len(stack) + 1):
        if found == [is_sparse(index, step) for index in range(len(stack))]:
            return {f"num_sparse_{name}_layers": sum(found), f"{name}_sparse_step": step}
    where = [index for index, sparse in enumerate(found) if sparse]
    raise HanlinError(
        f'The family "switch_transformers" has experts in every n-th layer, from the second on; this {name} has '
        f"them in the layers {where} of {len(stack)}."
    )


def expert_weights(theirs: str, ours: str) -> tuple[tuple[str, str] | Rule, ...]:
    """The router and the experts of the layers that have them."""
    return (
        (theirs + "router.classifier.weight", ours + "router.weight"),
        (theirs + "router.classifier.bias", ours + "router.bias"),
        stacked((theirs + "experts.expert_{e}.wi.weight",), ours + "experts.up_proj"),
        stacked((theirs + "experts.expert_{e}.wo.weight",), ours + "experts.down_proj"),
    )


SWITCH_TRANSFORMERS = Family(
    name="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    bare="SwitchTransformersModel",
    common=SIZES,
    settings={
        "d_model": Setting(("width",), int, 768),
        "d_ff": Setting(("feed_forward.hidden", "experts.hidden"), int, 2048),
        "num_heads": Setting(("attention.heads",), int, 12),
        "num_decoder_layers": Setting(("depth",), int, 12, nullable=True),
        "dense_act_fn": Setting(
            ("feed_forward.activation", "experts.activation"), str, "relu", convert=known_activation
        ),
        "num_experts": Setting(("experts.count",), int, 8),
        "expert_capacity": Setting(("router.capacity",), int, 64),
        "router_bias": Setting(("router.bias",), bool, False),
        "router_jitter_noise": Setting(("router.jitter",), float, 0.01),
    },
    always=ALWAYS
    | {
        "feed_forward.gated": False,
        "experts.gated": False,
        "router.top_k": 1,
        "router.renormalise": False,
        "router.wide": True,
        "tied_embeddings": True,
    },
    # A file that says "tie_word_embeddings": false has three different tables of token vectors.
    fixed={"is_encoder_decoder": True, "tie_word_embeddings": True, "router_dtype": "float32"},
    harmless=NOTES | {"router_ignore_padding_tokens", "add_router_probs", "router_z_loss_coef", "router_aux_loss_coef"},
    hooked=frozenset({"num_layers", BUCKETS, DISTANCE})
    | {key for name in ("encoder", "decoder") for key in (f"num_sparse_{name}_layers", f"{name}_sparse_step")},
    absent={"pad_token_id": 0, "eos_token_id": 1},
    rotary=False,
    finish=fill,
    shape=shape,
    describe=describe,
    weights=(
        *all_weights({"mlp.wi": "mlp.up_proj", "mlp.wo": "mlp.down_proj"}),
        *expert_weights("encoder.block.{}.layer.1.mlp.", "encoder.layers.{}.mlp."),
        *expert_weights("decoder.block.{}.layer.2.mlp.", "model.layers.{}.mlp."),
    ),
    skipped=SKIPPED,
)
