"""DeepSeekMoE (arXiv:2401.06066), `model_type` "deepseek": Llama with many small experts behind the first dense layers,
some of which every token goes through: together they are one shared expert. Without experts it is Llama."""

from collections.abc import Callable, Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families.family import Family, Values
from hanlin.models.families.keys import Setting, read_count
from hanlin.models.families.sparse import (
    ACTIVATION,
    ROUTER_NOTES,
    dense_indices,
    expert_weights,
    first_experts,
    with_dense,
)

HIDDEN = 11008  # of a dense feed-forward where the file says none
NOTES = ROUTER_NOTES | {"aux_loss_alpha", "seq_aux", "ep_size"}
HOOKED = frozenset({"first_k_dense_replace", "moe_layer_freq", "n_shared_experts"})
WEIGHTS = expert_weights(shared="shared_experts")


def share_experts(values: Values, json: Mapping[str, Any], *, default: int, least: int) -> None:
    """`n_shared_experts` experts beside each other are one that is as many times as wide."""
    shared = read_count(json, "n_shared_experts", default, least=least)
    values["experts.shared_hidden"] = shared * values["experts.hidden"]
    if values["experts.count"] is not None and values["router.top_k"] is None:
        raise HanlinError('"num_experts_per_tok" is missing; it must be a positive integer.')


def finish(values: Values, json: Mapping[str, Any]) -> None:
    """The shared expert; the weight of a single expert is never divided by itself."""
    share_experts(values, json, default=0, least=0)
    if values["router.top_k"] == 1:
        values["router.renormalise"] = False


def dense_first(hidden: int, first: int) -> Callable[[ModelConfig, Mapping[str, Any]], ModelConfig]:
    """Experts stand in every `moe_layer_freq`-th layer from `first_k_dense_replace` (default: `first`) on."""

    def shape(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
        start = read_count(json, "first_k_dense_replace", first, least=0)
        step = read_count(json, "moe_layer_freq", 1, least=1)
        return with_dense(config, lambda i: i < start or i % step != 0, json.get("intermediate_size", hidden))

    return shape


def say_dense_first(config: ModelConfig) -> dict[str, Any]:
    """The first layer with experts and the step between them (1 where no step says it), and how many are shared."""
    depth, dense = len(config.layers), set(dense_indices(config))
    sparse = [i for i in range(depth) if i not in dense]
    first = sparse[0] if sparse else depth
    steps = (step for step in range(1, depth + 1) if sparse == [i for i in range(first, depth) if i % step == 0])
    said: dict[str, Any] = {"first_k_dense_replace": first, "moe_layer_freq": next(steps, 1)}
    experts = first_experts(config)
    return said if experts is None else said | {"n_shared_experts": experts.shared_hidden // experts.hidden}


DEEPSEEK = Family(
    name="deepseek",
    architecture="DeepseekForCausalLM",
    settings={
        "head_dim": None,
        "max_position_embeddings": Setting(("max_positions",), int, 2048),
        "attention_bias": Setting(("attention.qkv_bias", "attention.output_bias"), bool, False),
        "intermediate_size": Setting(("feed_forward.hidden",), int, HIDDEN),
        "hidden_act": ACTIVATION,
        "n_routed_experts": Setting(("experts.count",), int, None),
        "num_experts_per_tok": Setting(("router.top_k",), int, None),
        "moe_intermediate_size": Setting(("experts.hidden",), int, 1407),
        "norm_topk_prob": Setting(("router.renormalise",), bool, False),
    },
    fixed={"scoring_func": "softmax"},
    harmless=NOTES,
    hooked=HOOKED,
    absent={"bos_token_id": 100000, "eos_token_id": 100001},
    whole_heads=True,
    finish=finish,
    shape=dense_first(HIDDEN, 0),
    describe=say_dense_first,
    weights=WEIGHTS,
)
