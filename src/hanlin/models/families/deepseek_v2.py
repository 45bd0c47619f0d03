"""DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention; experts chosen inside the best groups (or everywhere, in
the Lite model), weighed by a softmax over all of them that is not divided again but scaled."""

from collections.abc import Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import LatentAttentionConfig, ModelConfig
from hanlin.models.families.deepseek import HIDDEN, HOOKED, NOTES, WEIGHTS, dense_first, say_dense_first, share_experts
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, read_count
from hanlin.models.families.sparse import ACTIVATION, first_experts
from hanlin.nn.rope_scaling import Yarn

LATENT: dict[str, Setting | None] = {
    "num_attention_heads": Setting(("latent.heads",), int),
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": Setting(("latent.bias",), bool, False),
    "kv_lora_rank": Setting(("latent.kv_rank",), int, 512),
    "q_lora_rank": Setting(("latent.q_rank",), int, 1536, nullable=True),
    "qk_nope_head_dim": Setting(("latent.nope_dim",), int, 128),
    "qk_rope_head_dim": Setting(("latent.rope_dim",), int, 64),
    "v_head_dim": Setting(("latent.value_dim",), int, 128),
}
LATENT_HOOKED = HOOKED | {"num_key_value_heads", "head_dim", "qk_head_dim"}  # the widths of a head follow from others
METHODS = ("greedy", "group_limited_greedy")


def finish_latent(values: Values, json: Mapping[str, Any]) -> None:
    """Every head has its own keys; with YaRN a part of its temperature stands in the scale of the scores."""
    heads, kv_heads = values["latent.heads"], json.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise HanlinError(
            f'"num_key_value_heads" is {kv_heads!r}; in latent attention it is "num_attention_heads", {heads}.'
        )
    scaling = values.get("rope.scaling")
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim:
        width = values["latent.nope_dim"] + values["latent.rope_dim"]
        values["latent.scale"] = width**-0.5 * scaling.score_scale


def say_latent(config: ModelConfig) -> dict[str, Any]:
    """What follows from other keys here and not everywhere."""
    a = config.layers[0].attention
    return {"num_key_value_heads": a.heads} if isinstance(a, LatentAttentionConfig) else {}


def finish(values: Values, json: Mapping[str, Any]) -> None:
    """Attention, the shared expert, groups where `topk_method` uses them."""
    finish_latent(values, json)
    share_experts(values, json, default=2, least=1)
    method = json.get("topk_method") or METHODS[0]
    if method not in METHODS:
        raise HanlinError(f'"topk_method" is {method!r}; Hanlin knows {" and ".join(METHODS)}.')
    if method == METHODS[1]:
        values["router.groups"] = read_count(json, "n_group", 1, least=1)
        values["router.top_groups"] = read_count(json, "topk_group", 1, least=1)


def describe(config: ModelConfig) -> dict[str, Any]:
    """The keys that the hooks read."""
    if config.width % config.layers[0].attention.heads:
        raise HanlinError(
            'In the family "deepseek_v2" the width must divide among the heads, or transformers refuses the file; '
            f"{config.width} does not among {config.layers[0].attention.heads}."
        )
    said, experts = say_dense_first(config) | say_latent(config), first_experts(config)
    if experts is None:
        return said
    r = experts.router
    return said | {"topk_method": METHODS[r.groups > 1], "n_group": r.groups, "topk_group": r.top_groups}


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    settings={
        **LATENT,
        "max_position_embeddings": Setting(("max_positions",), int, 2048),
        "intermediate_size": Setting(("feed_forward.hidden",), int, HIDDEN),
        "hidden_act": ACTIVATION,
        "n_routed_experts": Setting(("experts.count",), int, 64),
        "num_experts_per_tok": Setting(("router.top_k",), int, None),
        "moe_intermediate_size": Setting(("experts.hidden",), int, 1407),
        "routed_scaling_factor": Setting(("router.scale",), float, 1.0),
    },
    always={"rope.interleaved": True, "router.renormalise": False, "router.wide": True},
    fixed={"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    harmless=NOTES,
    hooked=(LATENT_HOOKED | {"topk_method", "n_group", "topk_group"}) - {"moe_layer_freq"},
    absent={"bos_token_id": 1, "eos_token_id": 2},
    finish=finish,
    shape=dense_first(HIDDEN, 0),
    describe=describe,
    weights=WEIGHTS,
)
