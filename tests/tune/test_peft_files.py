"""Adapters in PEFT's files: against PEFT itself where it is installed, and against a twin that reads the files by name
and puts W + s B A into a model of transformers."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.oracle import logits_of, make_oracle, save_theirs, some_ids
from transformers import GPT2Config, GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

from hanlin.core.errors import HanlinError
from hanlin.models import load_model
from hanlin.tune import add_lora, load_lora, save_lora

CLOSE = 5e-5  # norms and RoPE of transformers are fp32 in a model of any dtype

FULL = {  # every setting that PEFT 0.19 writes for a plain LoRA
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "somewhere/base", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 12, "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
    "peft_version": "0.19.1", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
    "target_modules": ["v_proj", "q_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    """A model of transformers and ours, in fp64, with the same weights."""
    theirs = make_oracle("qwen3")
    folder = save_theirs(theirs, tmp_path / "base")
    return theirs.double(), load_model(folder, dtype=torch.float64)


def write_adapter(folder, config=None, *, modules=("q_proj", "v_proj"), ranks=None, change=None):
    """What PEFT would write for the model of `pair`, with random factors."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    shapes = {"q_proj": (96, 64), "k_proj": (48, 64), "v_proj": (48, 64), "o_proj": (64, 96)}
    tensors = {}
    for layer in range(3):
        for module in modules:
            out, width = shapes[module]
            rank = (ranks or {}).get((layer, module), 4)
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.2
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(FULL | (config or {})))
    return folder


@torch.no_grad()
def add_by_hand(model, folder):
    """The twin: reads names, ranks and alphas as PEFT documents them and adds s B A to the weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert any(name.endswith("." + t) or name == t for t in config["target_modules"]), name
        rank, alpha = config["r"], config["lora_alpha"]
        for pattern, value in config["rank_pattern"].items():
            rank = value if re.match(rf"(.*\.)?({pattern})$", name) else rank
        for pattern, value in config["alpha_pattern"].items():
            alpha = value if re.match(rf"(.*\.)?({pattern})$", name) else alpha
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        assert a.shape[0] == rank
        modules[name].weight += (b @ a) * (alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def ours_of(model):
    with torch.no_grad():
        return model(some_ids()).logits


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ({}, {}),
        ({"use_rslora": True, "r": 4}, {}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 40}},
         {(i, "q_proj"): 2 for i in range(3)}),
    ],
)  # fmt: skip
def test_an_adapter_of_peft_loads(pair, tmp_path, config, ranks):
    theirs, ours = pair
    folder = write_adapter(tmp_path / "adapter", config, ranks=ranks)
    before = ours_of(ours)
    adapter = load_lora(ours, folder)
    add_by_hand(theirs, folder)
    expected = logits_of(theirs, some_ids())
    torch.testing.assert_close(ours_of(ours), expected, rtol=0, atol=CLOSE)
    assert (expected - before).abs().max() > 0.1
    assert adapter.settings.dropout == 0.05 and all(p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize("targets", ["all", ("q_proj", "v_proj"), ("layers.1.self_attn.o_proj", "up_proj")])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_says_the_same_in_a_model_of_transformers(pair, tmp_path, targets, rslora):
    theirs, ours = pair
    adapter = add_lora(ours, 3, 24, targets, rslora=rslora)
    redraw(adapter)
    save_lora(adapter, tmp_path / "adapter", base_model="somewhere/base")
    add_by_hand(theirs, tmp_path / "adapter")
    torch.testing.assert_close(ours_of(ours), logits_of(theirs, some_ids()), rtol=0, atol=CLOSE)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base" and config["task_type"] == "CAUSAL_LM"
    assert config.keys() <= FULL.keys() and config["lora_alpha"] == 24 and isinstance(config["lora_alpha"], int)
    assert len(config["target_modules"]) == {"all": 7}.get(targets, 2 if "q_proj" in targets else 4)


@torch.no_grad()
def redraw(adapter):
    generator = torch.Generator().manual_seed(7)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_saved_and_loaded_it_is_the_same_adapter(pair, tmp_path):
    _, ours = pair
    folder = write_adapter(
        tmp_path / "one", {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 2.5}},
        ranks={(1, "q_proj"): 6},
    )  # fmt: skip
    adapter = load_lora(ours, folder)
    expected = ours_of(ours)
    save_lora(adapter, tmp_path / "two")
    adapter.remove()
    again = load_lora(ours, tmp_path / "two")
    assert torch.equal(ours_of(ours), expected)
    assert again.settings == adapter.settings
    assert {n: b.settings for n, b in again.branches.items()} == {n: b.settings for n, b in adapter.branches.items()}


def test_it_loads_into_bf16_and_stays_fp32(pair, tmp_path):
    _, ours = pair
    adapter = load_lora(ours.bfloat16(), write_adapter(tmp_path / "adapter"))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def drop(key):
    return lambda tensors: tensors.pop(f"base_model.model.model.layers.{key}.weight")


def put(key, *shape):
    return lambda tensors: tensors.update({f"base_model.model.{key}": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"peft_type": "IA3"}, None, "\"peft_type\" is 'IA3'"),
        ({"use_dora": True}, None, "has no lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, None, '"modules_to_save"'),
        ({"bias": "all"}, None, "\"bias\" is 'all'"),
        ({"init_lora_weights": "pissa"}, None, "changes the weights of the base model"),
        ({"a_new_idea": 3}, None, '"a_new_idea" is 3'),
        ({"r": 0}, None, "rank of a LoRA is 0"),
        ({"r": 8}, None, r"lora_A of model.layers.0.self_attn.q_proj is \[4, 64\], expected \[8, 64\] \(rank 8"),
        ({}, drop("1.self_attn.q_proj.lora_B"), "layers.1.self_attn.q_proj has no lora_B"),
        ({}, put("model.layers.2.self_attn.v_proj.lora_B.weight", 50, 4), r"is \[50, 4\], expected \[48, 4\]"),
        (
            {},
            put("model.layers.0.self_attn.qq_proj.lora_A.weight", 4, 64),
            "nearest layer is .*layers.0.*.q_proj",
        ),
        ({}, put("lm_head.lora_A.weight", 4, 64), "belongs to no linear layer"),
        ({}, put("model.embed_tokens.lora_embedding_A", 4, 64), "belongs to no linear layer"),
        ({}, lambda tensors: tensors.clear(), "holds no adapter"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(pair, tmp_path, config, change, message):
    _, ours = pair
    before = ours_of(ours)
    folder = write_adapter(tmp_path / "adapter", config, change=change)
    with pytest.raises(HanlinError, match=message):
        load_lora(ours, folder)
    assert torch.equal(ours_of(ours), before) and all(p.requires_grad for p in ours.parameters())


def test_damaged_and_missing_files_are_refused(pair, tmp_path):
    _, ours = pair
    with pytest.raises(HanlinError, match=r"no adapter_config\.json"):
        load_lora(ours, tmp_path / "nowhere")
    folder = write_adapter(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(HanlinError, match="not a whole safetensors file"):
        load_lora(ours, folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(HanlinError, match="is a pickle"):
        load_lora(ours, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(HanlinError, match=r"no adapter_model\.safetensors"):
        load_lora(ours, folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(HanlinError, match="must be a JSON object, found a list"):
        load_lora(ours, folder)
    with pytest.raises(HanlinError, match="is a file; an adapter is a folder"):
        save_lora(add_lora(ours), folder / "adapter_config.json")


@pytest.fixture
def gpt2(tmp_path):
    """A family whose names are others, whose matrices are stored the other way round, and whose q, k, v are one."""
    sizes = {"vocab_size": 131, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2)
    folder = save_theirs(theirs, tmp_path / "gpt2")
    return theirs.double(), load_model(folder, dtype=torch.float64)


def test_names_and_layouts_of_a_family_are_its_own(gpt2, tmp_path):
    theirs, ours = gpt2
    adapter = add_lora(ours, 3, targets=("o_proj", "up_proj", "down_proj"))
    redraw(adapter)
    save_lora(adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and sorted(config["target_modules"]) == ["c_fc", "c_proj"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for layer in range(2):
            for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                key = f"base_model.model.transformer.h.{layer}.{name}.lora_"
                update = tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"] * (16 / 3)
                theirs.get_submodule(f"transformer.h.{layer}.{name}").weight += update.T
    expected = logits_of(theirs, some_ids())
    torch.testing.assert_close(ours_of(ours), expected, rtol=0, atol=CLOSE)
    adapter.remove()
    load_lora(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours_of(ours), expected, rtol=0, atol=CLOSE)


def test_an_adapter_of_a_joined_weight_is_refused_both_ways(gpt2, tmp_path):
    _, ours = gpt2
    with pytest.raises(HanlinError, match="q_proj is not a linear layer of its own"):
        save_lora(add_lora(ours, targets=("q_proj",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ours.adapter.remove()
    folder = write_adapter(tmp_path / "adapter", change=put("transformer.h.0.attn.c_attn.lora_A.weight", 4, 32))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "c_attn" in k}, folder / "adapter_model.safetensors")
    with pytest.raises(
        HanlinError, match=r"several layers here \(model.layers.0.self_attn.q_proj, .*k_proj, .*v_proj\)"
    ):
        load_lora(ours, folder)


def test_a_weight_that_is_no_matrix_in_their_files_has_no_adapter_there(tmp_path):
    """XLNet keeps (width, heads, head_dim): for PEFT that is no linear layer. Its feed-forward is one."""
    sizes = {"vocab_size": 131, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    folder = save_theirs(XLNetLMHeadModel(XLNetConfig(**sizes)), tmp_path / "xlnet")
    ours = load_model(folder)
    adapter = add_lora(ours, targets=("o_proj", "up_proj"))
    with pytest.raises(HanlinError, match="o_proj is not a linear layer of its own"):
        save_lora(adapter, tmp_path / "adapter")
    adapter.remove()
    save_lora(add_lora(ours, targets=("up_proj",)), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sorted(tensors) == [f"base_model.model.transformer.layer.0.ff.layer_1.lora_{x}.weight" for x in "AB"]


def test_what_we_save_peft_loads(pair, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = pair
    adapter = add_lora(ours, 3, 24, "all", rslora=True)
    redraw(adapter)
    save_lora(adapter, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False).double()
    torch.testing.assert_close(ours_of(ours), logits_of(model, some_ids()), rtol=0, atol=CLOSE)


def test_what_peft_saves_we_load(pair, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = pair
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 6}, lora_dropout=0.1, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    load_lora(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours_of(ours), logits_of(model, some_ids()), rtol=0, atol=CLOSE)


def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(tmp_path):
    from hanlin.models import save_model

    model = load_model(save_theirs(make_oracle("qwen3"), tmp_path / "base"))
    adapter = add_lora(model, rank=2)
    with pytest.raises(HanlinError, match=r"merge\(\)"):
        save_model(model, tmp_path / "x")
    adapter.merge()
    adapter.remove()
    save_model(model, tmp_path / "x")
