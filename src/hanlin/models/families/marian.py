"""The original Transformer (arXiv:1706.03762) in Marian's layout (arXiv:1804.00344): sinusoidal positions, norms behind
the sums, biases everywhere, token vectors that encoder, decoder and head share, times the root of the width.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families import bart
from hanlin.models.families.keys import Setting, read_count

POSITIONS = tuple(f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder"))  # computed here


def shape(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
    """BART's, where both sides have one vocabulary."""
    size = read_count(json, "decoder_vocab_size", config.vocab_size)
    if size != config.vocab_size:
        raise HanlinError(
            f'"decoder_vocab_size" is {size} and "vocab_size" {config.vocab_size}; '
            "Hanlin has one vocabulary for both sides."
        )
    return bart.shape(config, json)


def describe(config: ModelConfig) -> dict[str, Any]:
    """BART's keys, and the one vocabulary."""
    shared = {"decoder_vocab_size": config.vocab_size, "share_encoder_decoder_embeddings": True}
    return bart.describe(config) | shared


MARIAN = replace(
    bart.BART,
    name="marian",
    model_type="marian",
    architecture="MarianMTModel",
    bare="MarianModel",
    settings={"vocab_size": Setting(("vocab_size",), int, 58101)},
    always=bart.ALWAYS | {"embedding.positions": "sinusoidal", "embedding.sinusoid": "halves"},
    fixed=bart.FIXED
    | {"share_encoder_decoder_embeddings": True, "normalize_embedding": False, "static_position_embeddings": True},
    harmless=bart.NOTES | {"extra_pos_embeddings"},
    hooked=bart.HOOKED | {"decoder_vocab_size"},
    absent={"pad_token_id": 58100, "eos_token_id": 0, "decoder_start_token_id": 58100, "forced_eos_token_id": 0},
    shape=shape,
    describe=describe,
    weights=bart.WEIGHTS,
    skipped=(*bart.SKIPPED, *POSITIONS),
)
