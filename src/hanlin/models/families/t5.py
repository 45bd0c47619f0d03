"""T5 (arXiv:1910.10683) and T5 v1.1 (arXiv:2002.05202): an encoder and a decoder with a learnt bias of distances, one
table a stack, RMS norms in front, no biases, and scores q k that nothing divides.

v1.0 has ReLU and a head that shares the embedding and reads hidden * width^-0.5; v1.1 a gated GELU and its own head.
"tie_word_embeddings" says both, since files of v1.1 say false there; "scale_decoder_outputs" says the factor alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import BucketPosition, ModelConfig
from hanlin.models.families.encoder_decoder import first_encoder_layer, flag_of, with_encoder
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, known_activation, read_count

BUCKETS, DISTANCE = "relative_attention_num_buckets", "relative_attention_max_distance"
SIZES = {
    "vocab_size": Setting(("vocab_size",), int, 32128),
    "d_model": Setting(("width",), int, 512),
    "d_kv": Setting(("attention.head_dim",), int, 64),
    "d_ff": Setting(("feed_forward.hidden",), int, 2048),
    "num_heads": Setting(("attention.heads",), int, 8),
    "num_decoder_layers": Setting(("depth",), int, None),
    "n_positions": Setting(("max_positions",), int, 512),  # a note of the trained length: distances know no end
    "layer_norm_epsilon": Setting(("norm_eps",), float, 1e-6),
}
ALWAYS: dict[str, Any] = {"attention.scale": 1.0}
NOTES = frozenset({"dropout_rate", "classifier_dropout", "initializer_factor", "output_past"})
SKIPPED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # in old files; nothing reads it
)


def fill_positions(values: Values, json: Mapping[str, Any], *, depth: int) -> None:
    """The buckets of distances, and as many decoder layers as the encoder has where the file leaves them to that."""
    values["attention.position"] = BucketPosition(read_count(json, BUCKETS, 32), read_count(json, DISTANCE, 128))
    values["depth"] = values["depth"] or read_count(json, "num_layers", depth)


def say_stacks(config: ModelConfig) -> dict[str, Any]:
    """The encoder's depth and the buckets."""
    position = first_encoder_layer(config).attention.position
    if not isinstance(position, BucketPosition):
        raise HanlinError(f'The family "{config.family}" has buckets of distances; this model has {position}.')
    sizes = {"num_layers": len(config.encoder), BUCKETS: position.buckets, DISTANCE: position.max_distance}
    return {"is_encoder_decoder": True} | sizes


def is_gated(json: Mapping[str, Any]) -> bool:
    """Whether a file is of v1.1's layout: the explicit key counts, then the name."""
    said = json.get("is_gated_act")
    return str(json.get("feed_forward_proj")).startswith("gated") if said is None else bool(said)


def is_plain(json: Mapping[str, Any]) -> bool:
    """Whether a file is of v1.0's layout."""
    return not is_gated(json)


def fill(values: Values, json: Mapping[str, Any]) -> None:
    """The activation and the factor in front of the head."""
    fill_positions(values, json, depth=6)
    flag_of(json, "is_gated_act", False)
    named = str(json.get("feed_forward_proj") or "relu")
    kind, _, name = named.rpartition("-")
    if kind not in ("", "gated"):
        raise HanlinError(f'"feed_forward_proj" is {named!r}; it must be an activation, or "gated-" and one.')
    name = "gelu_new" if named == "gated-gelu" else name
    values["feed_forward.activation"] = known_activation(str(json.get("dense_act_fn") or name))
    scaled = flag_of(json, "scale_decoder_outputs", values["tied_embeddings"])
    values["head.input_scale"] = values["width"] ** -0.5 if scaled else 1.0


def shape(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
    """The encoder beside the decoder."""
    return with_encoder(config, read_count(json, "num_layers", 6))


def describe(config: ModelConfig) -> dict[str, Any]:
    """The stacks, the activation, the factor."""
    f = first_encoder_layer(config).feed_forward
    gated, name = f.gated, "gelu" if f.gated and f.activation == "gelu_new" else f.activation
    scaled = config.tied_embeddings if config.head is None else config.head.input_scale != 1
    return say_stacks(config) | {
        "feed_forward_proj": f"gated-{name}" if gated else name,
        "dense_act_fn": f.activation,
        "is_gated_act": gated,
        "scale_decoder_outputs": scaled,
    }


def stack_weights(
    theirs: str, ours: str, feed_forward: Mapping[str, str], *, cross: bool
) -> tuple[tuple[str, str], ...]:
    """The names of one stack. feed_forward: theirs -> ours, of its plain matrices."""
    block, layer = theirs + ".block.{}.layer.", ours + ".layers.{}."
    last = f"{block}{2 if cross else 1}."
    rows = {f"{block}0.SelfAttention.{x}": f"{layer}self_attn.{x}_proj" for x in "qkvo"}
    rows[block + "0.layer_norm"] = layer + "input_layernorm"
    if cross:
        rows |= {f"{block}1.EncDecAttention.{x}": f"{layer}cross_attn.{x}_proj" for x in "qkvo"}
        rows[block + "1.layer_norm"] = layer + "cross_attention_layernorm"
    rows[last + "layer_norm"] = layer + "post_attention_layernorm"
    rows |= {last + name: layer + our for name, our in feed_forward.items()}
    rows[theirs + ".block.0.layer.0.SelfAttention.relative_attention_bias"] = ours + ".relative_bias.embedding"
    rows[theirs + ".final_layer_norm"] = ours + ".norm"
    return tuple((f"{name}.weight", f"{our}.weight") for name, our in rows.items())


def all_weights(feed_forward: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The names of both stacks and of the token vectors that they share."""
    return (
        ("shared.weight", "model.embed_tokens.weight"),
        *stack_weights("encoder", "encoder", feed_forward, cross=False),
        *stack_weights("decoder", "model", feed_forward, cross=True),
    )


PLAIN = {"DenseReluDense.wi": "mlp.up_proj", "DenseReluDense.wo": "mlp.down_proj"}
WAYS = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
GATED = {f"DenseReluDense.{theirs}": f"mlp.{ours}_proj" for theirs, ours in WAYS}

T5 = Family(
    name="t5",
    architecture="T5ForConditionalGeneration",
    bare="T5Model",
    also=("T5WithLMHeadModel",),
    claims=is_plain,
    common=SIZES,
    settings={"tie_word_embeddings": Setting(("tied_embeddings",), bool, True)},
    always=ALWAYS | {"feed_forward.gated": False},
    fixed={"is_encoder_decoder": True},
    harmless=NOTES,
    hooked=frozenset(
        {"num_layers", "feed_forward_proj", "dense_act_fn", "is_gated_act", "scale_decoder_outputs", BUCKETS, DISTANCE}
    ),
    absent={"pad_token_id": 0, "eos_token_id": 1},
    rotary=False,
    finish=fill,
    shape=shape,
    describe=describe,
    weights=all_weights(PLAIN),
    skipped=SKIPPED,
)
ALWAYS_GATED = ALWAYS | {"feed_forward.gated": True}
T5_V11 = replace(T5, name="t5-v1.1", model_type="t5", claims=is_gated, always=ALWAYS_GATED, weights=all_weights(GATED))
