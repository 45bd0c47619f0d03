"""RoBERTa (arXiv:1907.11692): BERT without sentence pairs, trained longer.

It differs in the positions' table: the first rows, up to that of the padding token, belong to no position, so that
position 0 is row `pad_token_id` + 1. Padding is not counted: with padding in front of a text, pass `positions` that
begin at its first token.
"""

from collections.abc import Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families.bert import ENCODER, FIXED, NOTES, SIZES, encoder_weights
from hanlin.models.families.family import Family, Values
from hanlin.models.families.gpt2 import biased
from hanlin.models.families.keys import Setting
from hanlin.models.families.stored_heads import StoredHead
from hanlin.nn.heads import Pooler


def finish(values: Values, json: Mapping[str, Any]) -> None:
    """Where positions begin in their table, and how many there are."""
    padding = json.get("pad_token_id")
    padding = 1 if padding is None else padding
    if not isinstance(padding, int) or isinstance(padding, bool) or not 0 <= padding < values["max_positions"] - 1:
        raise HanlinError(
            f'"pad_token_id" is {padding!r}; it must be a row of the positions\' table, which has '
            f"{values['max_positions']}, since the first position stands behind it."
        )
    values["embedding.offset"] = padding + 1
    values["max_positions"] -= padding + 1


def describe(config: ModelConfig) -> dict[str, Any]:
    """The keys that `finish` reads."""
    offset = config.embedding.offset
    return {"max_position_embeddings": config.max_positions + offset, "pad_token_id": offset - 1}


ROBERTA = Family(
    name="roberta",
    architecture="RobertaForMaskedLM",
    bare="RobertaModel",
    common=SIZES,
    settings={"vocab_size": Setting(("vocab_size",), int, 50265)},
    always=ENCODER | {"head.transform": "gelu"},
    fixed=FIXED,
    harmless=NOTES,
    absent={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    rotary=False,
    whole_heads=True,
    finish=finish,
    describe=describe,
    weights=(
        *encoder_weights("roberta."),
        *biased("lm_head.dense", "head_transform.dense"),
        *biased("lm_head.layer_norm", "head_transform.norm"),
        ("lm_head.decoder.weight", "lm_head.weight"),
        ("lm_head.bias", "lm_head.bias"),
    ),
    heads=(StoredHead("pooler", Pooler, biased("roberta.pooler.dense", "dense")),),
    skipped=("roberta.embeddings.position_ids", "lm_head.decoder.bias"),
    prefix="roberta.",
)
