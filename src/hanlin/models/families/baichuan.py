"""Baichuan 7B and 13B (2023; Baichuan 2: arXiv:2309.10305): Llama with q, k and v in one matrix, `W_pack`.

Both are called "baichuan": the 7B has rotary positions and a `max_position_embeddings`, the 13B ALiBi and a
`model_max_length`."""

from collections.abc import Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import AlibiPosition
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting
from hanlin.models.families.weights import fused

ATTENTION = "model.layers.{}.self_attn."
W_PACK = fused(f"{ATTENTION}W_pack.weight", [f"{ATTENTION}{name}_proj.weight" for name in "qkv"])
ABSENT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HARMLESS = frozenset({"_from_model_config", "gradient_checkpointing_enable", "user_token_id", "assistant_token_id"})
SHAPE: dict[str, Setting | None] = {"num_key_value_heads": None, "head_dim": None}


def refuse_second(values: Values, json: Mapping[str, Any]) -> None:
    """Baichuan 2 has the same names and another head; its files have a key for the loss that keeps it in bounds."""
    if "z_loss_weight" in json:
        raise HanlinError(
            '"z_loss_weight" marks Baichuan 2, whose head scales each of its rows to length 1 (NormHead); Hanlin reads '
            "the first Baichuan. With the rows of lm_head.weight normalised once and this key deleted, the numbers are "
            "the same."
        )


BAICHUAN = Family(
    name="baichuan",
    architecture="BaiChuanForCausalLM",
    also=("BaichuanForCausalLM",),
    claims=lambda json: json.get("max_position_embeddings") is not None,
    settings=SHAPE | {"max_position_embeddings": Setting(("max_positions",), int, 4096)},
    always={"rope.theta": 10_000.0},
    harmless=HARMLESS | {"model_max_length"},
    hooked=frozenset({"z_loss_weight"}),
    absent=ABSENT,
    rotary=False,  # the base is a number in the code
    finish=refuse_second,
    weights=(W_PACK,),
)
BAICHUAN_13B = Family(
    name="baichuan-13b",
    model_type="baichuan",
    architecture="BaichuanForCausalLM",
    settings=SHAPE | {"max_position_embeddings": None, "model_max_length": Setting(("max_positions",), int, 4096)},
    always={"attention.position": AlibiPosition()},
    harmless=HARMLESS,
    hooked=frozenset({"z_loss_weight"}),
    absent=ABSENT,
    rotary=False,
    finish=refuse_second,
    weights=(W_PACK,),
)
