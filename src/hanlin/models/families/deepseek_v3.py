"""DeepSeek-V3 and R1 (arXiv:2412.19437): V2 with sigmoid scores, experts and their groups chosen by scores plus a
correction that balances them without a loss, and modules that predict further tokens ahead."""

import re
from collections.abc import Mapping
from typing import Any

from hanlin.models.config import ModelConfig
from hanlin.models.families.deepseek import NOTES, WEIGHTS, dense_first, say_dense_first, share_experts
from hanlin.models.families.deepseek_v2 import LATENT, LATENT_HOOKED, finish_latent, say_latent
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, read_count
from hanlin.models.families.sparse import ACTIVATION, LAYER

HIDDEN = 18432
AHEAD = re.compile(r"ahead\.steps\.(\d+)\.(?:layer\.)?(.+)")


def finish(values: Values, json: Mapping[str, Any]) -> None:
    """Attention, the shared expert, the modules that predict ahead."""
    finish_latent(values, json)
    share_experts(values, json, default=1, least=1)
    values["predict_ahead"] = read_count(json, "num_nextn_predict_layers", 0, least=0)


def describe(config: ModelConfig) -> dict[str, Any]:
    """The keys that the hooks read."""
    return say_dense_first(config) | say_latent(config) | {"num_nextn_predict_layers": config.predict_ahead}


def behind_the_last_layer(name: str, config: ModelConfig) -> str:
    """The modules that predict ahead stand in the files as further layers, their last norm beside the head."""
    found = AHEAD.fullmatch(name)
    if found is None:
        return name
    inside = f"shared_head.{found[2]}" if found[2].startswith("norm.") else found[2]
    return LAYER.format(len(config.layers) + int(found[1])) + inside


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    settings={
        **LATENT,
        "max_position_embeddings": Setting(("max_positions",), int, 4096),
        "rope_interleave": Setting(("rope.interleaved",), bool, True),
        "intermediate_size": Setting(("feed_forward.hidden",), int, HIDDEN),
        "hidden_act": ACTIVATION,
        "n_routed_experts": Setting(("experts.count",), int, 256),
        "num_experts_per_tok": Setting(("router.top_k",), int, 8),
        "moe_intermediate_size": Setting(("experts.hidden",), int, 2048),
        "n_group": Setting(("router.groups",), int, 8),
        "topk_group": Setting(("router.top_groups",), int, 4),
        "norm_topk_prob": Setting(("router.renormalise",), bool, True),
        "routed_scaling_factor": Setting(("router.scale",), float, 2.5),
    },
    always={
        "router.kind": "sigmoid",
        "router.wide": True,
        "router.group_score": "top2",
        "router.correction": True,
    },
    fixed={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    harmless=NOTES,
    hooked=(LATENT_HOOKED | {"num_nextn_predict_layers"}) - {"moe_layer_freq"},
    absent={"bos_token_id": 0, "eos_token_id": 1},
    finish=finish,
    shape=dense_first(HIDDEN, 3),
    describe=describe,
    weights=(*WEIGHTS, (LAYER + "mlp.gate.e_score_correction_bias", LAYER + "mlp.router.correction")),
    alias=behind_the_last_layer,
    # copies of the embedding and the head beside each module that predicts ahead
    skipped=(LAYER + "embed_tokens.weight", LAYER + "shared_head.head.weight", LAYER + "self_attn.rotary_emb.inv_freq"),
)
