"""What the families with experts need beside `test_families`: their experts' gradients, names, layers and defaults."""

from copy import deepcopy  # configs of transformers write into the tables that they are given
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.cases import inputs_of, redraw_all, reference_model
from tests.models.cases_experts import CASES, CONFIGS
from tests.models.oracle import SIZES
from tests.models.ours import load_ours, run_ours
from tests.nn.lifting import lifted
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, write_json
from hanlin.models import Transformer, load_config, load_model, save_model
from hanlin.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig
from hanlin.nn.rope import Rope
from hanlin.nn.rope_scaling import Yarn

BY_NAME = {case.name: case for case in CASES}
SAME_LAYOUT = (
    "mixtral",
    "qwen2-moe",
    "qwen2-moe-step",
    "qwen3-moe",
    "deepseek-v2",
    "deepseek-v3",
    "deepseek-v3-halves",
)


def config_of(folder, json: dict[str, Any]):
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", json)
    return load_config(folder)


def json_of(name: str) -> dict[str, Any]:
    """`config.json` of a case as transformers has it."""
    kind, settings = CONFIGS[name]
    return {k: v for k, v in kind(**deepcopy(SIZES | settings)).to_diff_dict().items() if k != "experts_implementation"}


def has_experts(config) -> list[bool]:
    return [isinstance(layer.feed_forward, ExpertsConfig) for layer in config.layers]


@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_gradients_of_experts_are_theirs(name, tmp_path):
    """Files of these families hold one tensor an expert; in memory both sides hold all experts in one."""
    case = BY_NAME[name]
    theirs = reference_model(case).double()
    ours = load_ours(case, theirs, tmp_path, torch.float64)
    inputs = inputs_of(case)
    weight = torch.randn(131, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = run_ours(case, ours, inputs).logits
    assert found is not None
    (found.log_softmax(-1) * weight).sum().backward()
    with lifted():
        expected = case.call(theirs, inputs)
    (expected.log_softmax(-1) * weight).sum().backward()
    names = {"shared_experts.": "shared.", "shared_expert_gate": "shared_gate", "shared_expert.": "shared."}
    compared, held = 0, dict(ours.named_parameters())
    for their_name, parameter in theirs.named_parameters():
        if ".mlp." not in their_name or parameter.grad is None:
            continue
        name_here = their_name.replace(".mlp.gate.weight", ".mlp.router.weight")
        for old, new in names.items():
            name_here = name_here.replace(old, new)
        grad = held[name_here].grad
        assert grad is not None, name_here
        assert (grad - parameter.grad).norm() <= 1e-9 * parameter.grad.norm(), name_here
        compared += 1
    assert compared == sum(".mlp." in name_here for name_here in held)


# -- which layers have experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2-moe", [True, False, True]),
        ("qwen2-moe-step", [False, True, False, True]),
        ("qwen3-moe-window", [False, True, True]),
        ("deepseek-v3-halves", [False, False, True]),
        ("llama4", [False, True, True, True]),
        ("llama4-maverick", [False, True, False, True]),
    ],
)
def test_experts_stand_in_the_layers_that_the_file_says(name, expected, tmp_path):
    assert has_experts(config_of(tmp_path, json_of(name))) == expected


def test_deepseek_takes_every_nth_layer_behind_the_dense_ones(tmp_path):
    json = BY_NAME["deepseek-moe"].build().config | {"num_hidden_layers": 7, "moe_layer_freq": 3}
    assert has_experts(config_of(tmp_path, json)) == [False, False, False, True, False, False, True]


@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_windows_of_qwen2_moe_are_those_of_transformers(first, tmp_path):
    """By default, since what transformers saves always lists them."""
    how = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": first, "num_hidden_layers": 4}
    theirs = Qwen2MoeConfig(**deepcopy(SIZES | how))
    config = config_of(tmp_path, {k: v for k, v in theirs.to_diff_dict().items() if k != "layer_types"} | how)
    windows = [layer.attention.window for layer in config.layers]
    assert windows == [6 if kind == "sliding_attention" else None for kind in theirs.layer_types]


def test_qwen3_moe_has_windows_in_all_layers_only_where_they_are_switched_on(tmp_path):
    json = json_of("qwen3-moe") | {"sliding_window": 4096}
    assert {layer.attention.window for layer in config_of(tmp_path, json).layers} == {None}
    json["use_sliding_window"] = True
    assert {layer.attention.window for layer in config_of(tmp_path, json).layers} == {4096}


# -- defaults and names of keys ----------------------------------------------------------------------------------------


def test_qwen3_moe_counts_its_experts_under_either_name(tmp_path):
    json = json_of("qwen3-moe")
    count = json.pop("num_local_experts")
    for names in (["num_experts"], ["num_local_experts"], ["num_experts", "num_local_experts"]):
        config = config_of(tmp_path, json | dict.fromkeys(names, count))
        assert config.layers[0].feed_forward.count == count == 6
    with pytest.raises(HanlinError, match='"num_local_experts" is 5'):
        config_of(tmp_path, json | {"num_experts": 6, "num_local_experts": 5})
    assert config_of(tmp_path, json).layers[0].feed_forward.count == Qwen3MoeConfig().num_experts


def test_gpt_oss_scales_its_positions_unless_the_file_says_otherwise(tmp_path):
    json = json_of("gpt-oss-plain")
    plain = config_of(tmp_path, json).layers[0].attention.position
    assert isinstance(plain, Rope) and plain.scaling is None
    del json["rope_parameters"]
    silent = config_of(tmp_path, json).layers[0].attention.position
    theirs = GptOssConfig().rope_parameters
    assert silent.theta == theirs["rope_theta"]
    assert silent.scaling == Yarn(
        theirs["factor"], theirs["original_max_position_embeddings"], beta_fast=theirs["beta_fast"],
        beta_slow=theirs["beta_slow"], truncate=theirs["truncate"],
    )  # fmt: skip


def test_llama4_says_by_default_every_fourth_layer_without_positions(tmp_path):
    json = json_of("llama4") | {"num_hidden_layers": 8}
    for key in ("no_rope_layers", "layer_types", "moe_layers"):
        json.pop(key, None)
    layers = [layer.attention for layer in config_of(tmp_path, json).layers]
    theirs = Llama4TextConfig(num_hidden_layers=8)
    assert [int(a.position is not None) for a in layers] == theirs.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]
    assert [a.chunk for a in layers] == [8 if a.position is not None else None for a in layers]
    assert [a.l2_norm for a in layers] == [a.query_scaling is None for a in layers] == [True, True, True, False] * 2
    assert has_experts(load_config(tmp_path)) == [i in theirs.moe_layers for i in range(8)] == [True] * 8


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_experts_per_tok": 7}, "7 experts"),
        ("qwen2-moe", {"mlp_only_layers": [3]}, "mlp_only_layers"),
        ("qwen2-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("deepseek-v2", {"topk_method": "best"}, "topk_method"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek-v2", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek-v2", {"n_shared_experts": 0}, "n_shared_experts"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek-v3", {"n_group": 5}, "5 equal groups"),
        ("llama4", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers"),
        ("llama4", {"layer_types": ["chunked_attention"]}, "layer_types"),
        ("llama4", {"moe_layers": [9]}, "moe_layers"),
        ("llama4", {"attention_chunk_size": 0}, "attention_chunk_size"),
        ("llama4", {"attn_scale": "much"}, "attn_scale"),
        ("llama4", {"use_qk_norm": "yes"}, "use_qk_norm"),
        ("gpt-oss", {"swiglu_alpha": 2.0}, "swiglu_alpha"),
        ("gpt-oss", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_named(name, change, message, tmp_path):
    with pytest.raises(HanlinError, match=message) as caught:
        config = config_of(tmp_path, json_of(name) | change)
        with torch.device("meta"):
            Transformer(config)
    if message in change:
        assert str(tmp_path / "config.json") in str(caught.value)


# -- what cannot be written --------------------------------------------------------------------------------------------


def test_experts_that_a_family_cannot_express_are_refused(tmp_path):
    config = config_of(tmp_path / "a", json_of("qwen3-moe"))
    layer = config.layers[0]
    wide = replace(layer, feed_forward=replace(layer.feed_forward, hidden=64))
    with torch.device("meta"):
        uneven = Transformer(replace(config, layers=(layer, wide, layer)))
        shared = Transformer(
            replace(config, layers=(replace(layer, feed_forward=replace(layer.feed_forward, shared_hidden=8)),))
        )
    for model in (uneven, shared):
        with pytest.raises(HanlinError):
            save_model(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# -- DeepSeek-V3's further layers --------------------------------------------------------------------------------------

NAMES = """
    enorm.weight hnorm.weight eh_proj.weight shared_head.norm.weight input_layernorm.weight
    post_attention_layernorm.weight self_attn.q_a_proj.weight self_attn.q_a_layernorm.weight self_attn.q_b_proj.weight
    self_attn.kv_a_proj_with_mqa.weight self_attn.kv_a_layernorm.weight self_attn.kv_b_proj.weight
    self_attn.o_proj.weight mlp.gate.weight mlp.gate.e_score_correction_bias mlp.shared_experts.gate_proj.weight
    mlp.shared_experts.up_proj.weight mlp.shared_experts.down_proj.weight
"""


@pytest.fixture
def ahead(tmp_path) -> Transformer:
    config = config_of(tmp_path / "config", json_of("deepseek-v3") | {"num_nextn_predict_layers": 2})
    model = Transformer(config).eval()
    redraw_all(model)
    return model


def test_modules_that_predict_ahead_stand_behind_the_last_layer(ahead, tmp_path):
    save_model(ahead, tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "config.json")["num_nextn_predict_layers"] == 2
    held = load_file(tmp_path / "saved" / "model.safetensors")
    each = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(12) for p in ("gate", "up", "down")]
    for step in (0, 1):
        found = {name for name in held if name.startswith(f"model.layers.{3 + step}.")}
        assert found == {f"model.layers.{3 + step}.{name}" for name in (*NAMES.split(), *each)}
    assert not any(name.startswith("model.layers.5.") or "ahead" in name for name in held)
    step = ahead.ahead.steps[1]
    assert torch.equal(held["model.layers.4.shared_head.norm.weight"], step.norm.weight)
    assert torch.equal(held["model.layers.4.eh_proj.weight"], step.eh_proj.weight)
    assert torch.equal(held["model.layers.4.mlp.experts.7.up_proj.weight"], step.layer.mlp.experts.gate_up_proj[7, 16:])


def test_published_files_with_copies_of_embedding_and_head_are_read(ahead, tmp_path):
    folder = tmp_path / "published"
    save_model(ahead, folder)
    held = load_file(folder / "model.safetensors")
    for layer in (3, 4):
        held[f"model.layers.{layer}.embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
        held[f"model.layers.{layer}.shared_head.head.weight"] = held["lm_head.weight"].clone()
    save_file(held, folder / "model.safetensors")
    again = load_model(folder)
    for (name, a), (other, b) in zip(ahead.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    ids = inputs_of(BY_NAME["deepseek-v3"]).ids
    with torch.no_grad():
        hidden = again(ids).hidden
        for one, two in zip(again.look_ahead(hidden, ids), ahead.look_ahead(ahead(ids).hidden, ids), strict=True):
            assert torch.equal(one, two)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_yarn_leaves_a_part_of_its_temperature_to_the_scores(tmp_path):
    """DeepSeek-V2's published values: mscale = mscale_all_dim = 0.707, factor 40: cosine and sine stay as they are."""
    rope = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 4096}  # fmt: skip
    json = {k: v for k, v in json_of("deepseek-v2").items() if k != "rope_parameters"}
    config = config_of(tmp_path, json | {"rope_scaling": rope, "rope_theta": 10000})
    a = config.layers[0].attention
    assert isinstance(a, LatentAttentionConfig) and a.scale is not None
    assert a.scale == pytest.approx(20**-0.5 * (0.1 * 0.707 * torch.tensor(40.0).log().item() + 1) ** 2, rel=1e-6)
    assert a.position.frequencies(8)[1] == 1.0


def test_a_dense_deepseek_is_a_llama(tmp_path):
    config = config_of(tmp_path, BY_NAME["deepseek-dense"].build().config)
    assert has_experts(config) == [False] * 3
    assert all(isinstance(layer.attention, AttentionConfig) for layer in config.layers)


def test_a_correction_keeps_its_precision_in_a_half_precision_model(tmp_path):
    """Its steps are smaller than bf16's: rounded, it would choose other experts."""
    case = BY_NAME["deepseek-v3"]
    theirs = reference_model(case)
    case.save(theirs, tmp_path)
    whole, half = load_model(tmp_path), load_model(tmp_path, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(whole.named_buffers(), half.named_buffers(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b), name
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
