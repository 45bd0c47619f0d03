"""Model folders: what is saved comes back bit for bit; what cannot be honoured is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.oracle import CONFIGS, load_theirs, logits_of, make_oracle, redraw, save_theirs, some_ids

from hanlin.core.errors import HanlinError
from hanlin.models import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    Transformer,
    load_config,
    load_model,
    save_model,
)
from hanlin.models.families import Family


def make_config(family: str = "qwen3", **changes) -> ModelConfig:
    attention = AttentionConfig(4, 2, 16, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    settings = {"vocab_size": 50, "width": 64, "max_positions": 128, "init_std": 0.1} | changes
    return ModelConfig.uniform(family, depth=2, attention=attention, feed_forward=FeedForwardConfig(96), **settings)


def saved(tmp_path, family: str = "qwen3", **changes):
    torch.manual_seed(0)
    model = Transformer(make_config(family, **changes))
    redraw(model)
    save_model(model, tmp_path)
    return model


def edit(folder, remove=(), **changes):
    file = folder / "config.json"
    table = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in table.items() if k not in remove}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path, family, tied, dtype):
    torch.manual_seed(0)
    model = Transformer(make_config(family, tied_embeddings=tied)).to(dtype)
    redraw(model)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype == dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_their_config_survives_a_visit(tmp_path, name):
    """theirs -> ours -> theirs gives back every key that transformers wrote."""
    save_theirs(make_oracle(name), tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert {k: after.get(k, "absent") for k in before} == before


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_a_loaded_model_is_packed_trainable_and_free_of_its_file(tmp_path, dtype):
    saved(tmp_path)
    model = load_model(tmp_path, dtype=dtype)
    before = logits_of(model, some_ids(vocabulary=50))
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:  # in place, as `cp` does
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(logits_of(model, some_ids(vocabulary=50)), before)
    for layer in model.model.layers:
        projections = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        assert len({p.weight.untyped_storage().data_ptr() for p in projections}) == 1
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_the_dtype_can_be_chosen(tmp_path):
    model = saved(tmp_path)
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.head_weight, model.head_weight.bfloat16())


def test_auto_dtype_follows_the_config_and_without_it_the_weights(tmp_path):
    saved(tmp_path)
    edit(tmp_path, remove=["dtype"], torch_dtype="float64")  # the old name of the key
    assert load_model(tmp_path).head_weight.dtype == torch.float64
    edit(tmp_path, remove=["torch_dtype"])
    assert load_model(tmp_path).head_weight.dtype == torch.float32
    edit(tmp_path, dtype="int8")
    with pytest.raises(HanlinError, match=r'config.json: "dtype" is \'int8\''):
        load_model(tmp_path)


def test_shards_are_written_read_and_replaced(tmp_path):
    model = saved(tmp_path)
    save_model(model, tmp_path, shard_bytes=20_000)
    shards = sorted(f.name for f in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == 4 * model.parameter_count()
    ids = some_ids(vocabulary=50)
    assert torch.equal(logits_of(load_model(tmp_path), ids), logits_of(model, ids))
    assert (logits_of(load_theirs(tmp_path), ids) - logits_of(model, ids)).abs().max() <= 2e-5
    save_model(model, tmp_path)
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(logits_of(load_model(tmp_path), ids), logits_of(model, ids))


def test_shards_of_transformers_are_read(tmp_path):
    theirs = make_oracle("llama")
    save_theirs(theirs, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (logits_of(load_model(tmp_path), some_ids()) - logits_of(theirs, some_ids())).abs().max() <= 2e-5


def test_old_and_new_files_say_the_same(tmp_path):
    model = saved(tmp_path, "llama", rope_theta=500_000.0)
    edit(tmp_path, remove=["rope_theta"])
    assert load_config(tmp_path) == model.config
    edit(tmp_path, remove=["rope_parameters", "dtype"], rope_theta=500_000.0, rope_scaling=None, torch_dtype="float32")
    assert load_config(tmp_path) == model.config
    edit(tmp_path, rope_scaling={"type": "default"})
    assert load_config(tmp_path) == model.config
    edit(tmp_path, remove=["rope_theta"])
    assert load_config(tmp_path).rope_theta == 10_000.0


def test_absent_keys_mean_what_they_mean_to_transformers(tmp_path):
    theirs = make_oracle("mistral", head_dim=None, num_key_value_heads=4, num_attention_heads=4, sliding_window=4096)
    save_theirs(theirs, tmp_path)
    edit(tmp_path, remove=["sliding_window", "head_dim", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"])
    config = load_config(tmp_path)
    attention = config.layers[0].attention
    assert (attention.window, attention.head_dim, config.norm_eps, config.tied_embeddings) == (4096, 16, 1e-6, False)
    assert config.extra["eos_token_id"] == 2
    edit(tmp_path, remove=["num_key_value_heads"], num_attention_heads=8, hidden_size=64)
    assert load_config(tmp_path).layers[0].attention.kv_heads == 8


def test_token_ids_go_into_both_files_and_come_back(tmp_path):
    ids = {"eos_token_id": [3, 4], "pad_token_id": 0, "bos_token_id": None}
    model = Transformer(make_config(extra=ids))
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [3, 4], "pad_token_id": 0}
    assert {k: load_config(tmp_path).extra[k] for k in ids} == ids
    theirs = load_theirs(tmp_path)
    assert theirs.generation_config.eos_token_id == [3, 4] and theirs.generation_config.pad_token_id == 0


def test_generation_settings_survive_a_visit(tmp_path):
    saved(tmp_path)
    settings = {"eos_token_id": 7, "temperature": 0.6, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    save_model(load_model(tmp_path), tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == settings


def test_tied_weights_stored_twice_are_read_if_they_agree(tmp_path):
    model = saved(tmp_path, tied_embeddings=True)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_model(tmp_path).head_weight, model.head_weight)
    edit_weights(tmp_path, lambda t: t["lm_head.weight"].add_(1.0))
    with pytest.raises(HanlinError, match=r"lm_head\.weight that differs from model\.embed_tokens"):
        load_model(tmp_path)


def test_rotary_buffers_of_old_files_are_skipped(tmp_path):
    model = saved(tmp_path, "llama")
    edit_weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(load_model(tmp_path).head_weight, model.head_weight)


def test_a_family_may_name_its_weights_otherwise():
    family = Family("other", "OtherForCausalLM", weights=(("h.{}.attn.q.{}", "layers.{}.q_proj.{}"), ("wte", "embed")))
    assert family.our_name("h.12.attn.q.3") == "layers.12.q_proj.3"
    assert family.their_name("layers.12.q_proj.3") == "h.12.attn.q.3"
    assert family.their_name("embed") == "wte" and family.our_name("untouched") == "untouched"


def test_saving_keeps_what_else_is_in_the_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    saved(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


REFUSED = {
    "unknown RoPE, new": ({"rope_parameters": {"rope_type": "spiral"}}, r'"rope_parameters".*spiral'),
    "unknown RoPE, old": ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, r'"rope_scaling".*spiral'),
    "RoPE without its factor": ({"rope_scaling": {"rope_type": "linear"}}, r'"rope_scaling".*factor'),
    "RoPE with a stray key": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, r"beta"),
    "two bases": ({"rope_theta": 7.0}, r'"rope_parameters.rope_theta" 10000, "rope_theta" 7'),
    "bad base": ({"rope_theta": "x"}, r'"rope_theta" is \'x\''),
    "partial RoPE": ({"partial_rotary_factor": 0.5}, r'"partial_rotary_factor" is 0.5'),
    "partial RoPE, nested": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "0.25"),
    "activation": ({"hidden_act": "mystery"}, r"\"hidden_act\" is 'mystery'"),
    "unknown key": ({"attn_logit_softcapping": 50.0}, r'"attn_logit_softcapping" \(here 50.0\)'),
    "layer types": ({"layer_types": ["full_attention"]}, r'"layer_types" must be a list of 2'),
    "chunked layers": ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    "window without size": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "other head": ({"architectures": ["Qwen3ForSequenceClassification"]}, r'"architectures".*Qwen3ForCausalLM'),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, r'"quantization_config".*unquantised'),
    "zero layers": ({"num_hidden_layers": 0}, r'"num_hidden_layers" is 0; it must be a positive integer'),
    "fraction": ({"hidden_size": 64.5}, r'"hidden_size" is 64.5'),
    "truth": ({"num_attention_heads": True}, r'"num_attention_heads" is True'),
    "word": ({"tie_word_embeddings": "yes"}, r'"tie_word_embeddings" is \'yes\'; it must be true or false'),
    "heads": ({"num_key_value_heads": 3}, "4 query heads do not divide among 3"),
    "odd heads": ({"head_dim": 15}, "even head_dim"),
    "unknown family": ({"model_type": "qwen33"}, r'knows .*llama.*qwen3.* Did you mean "qwen3"'),
    "no family": ({"model_type": None}, "None, a family that Hanlin does not know"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, case):
    saved(tmp_path)
    changes, message = REFUSED[case]
    edit(tmp_path, **changes)
    with pytest.raises(HanlinError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_missing_size_is_named(tmp_path):
    saved(tmp_path)
    edit(tmp_path, remove=["hidden_size"])
    with pytest.raises(HanlinError, match=r'config.json: "hidden_size" is missing'):
        load_config(tmp_path)


def test_a_window_in_a_family_without_windows_is_refused(tmp_path):
    saved(tmp_path, "llama")
    for changes in ({"sliding_window": 8}, {"use_sliding_window": True}):
        edit(tmp_path, remove=["sliding_window"])
        edit(tmp_path, **changes)
        with pytest.raises(HanlinError, match="sliding_window"):
            load_config(tmp_path)


def test_missing_superfluous_and_misshapen_weights_are_named(tmp_path):
    saved(tmp_path)

    def spoil(tensors):
        del tensors["model.layers.1.self_attn.q_norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.norm.weight"] = torch.ones(32)

    edit_weights(tmp_path, spoil)
    with pytest.raises(HanlinError) as caught:
        load_model(tmp_path)
    for part in (
        "missing: model.layers.1.self_attn.q_norm.weight",
        "not part of this model: model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight is [32], expected [64]",
    ):
        assert part in str(caught.value)


def test_a_missing_head_points_to_tying(tmp_path):
    saved(tmp_path, tied_embeddings=True)
    edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(HanlinError, match=r'missing: lm_head.weight.*"tie_word_embeddings": true'):
        load_model(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    saved(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(HanlinError, match=r"'model.norm.weight' is stored as int8"):
        load_model(tmp_path)


def test_a_pickle_is_refused_unopened(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(HanlinError, match=r"pytorch_model\.bin, a pickle"):
        load_model(tmp_path)


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path):
    saved(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "no config.json"),
        (tmp_path / "model", "neither model.safetensors nor"),
    ):
        with pytest.raises(HanlinError, match=message):
            load_model(path)


def test_a_truncated_file_is_named(tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HanlinError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(tmp_path)


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path):
    save_model(saved(tmp_path), tmp_path, shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name, file = next(iter(table["weight_map"].items()))
    for wrong, message in (
        ({name: "../elsewhere.safetensors"}, "weight_map"),
        ({"model.ghost": file}, f"{file} lacks the weight 'model.ghost'"),
    ):
        index.write_text(json.dumps({"weight_map": table["weight_map"] | wrong}))
        with pytest.raises(HanlinError, match=message):
            load_model(tmp_path)
    index.write_text(json.dumps(table))
    (tmp_path / file).unlink()
    with pytest.raises(HanlinError, match=f"names {file}, which is not in the folder"):
        load_model(tmp_path)


UNSAVEABLE = {
    "QK norm in Llama": ("llama", {"qk_norm": True}, "attention.qk_norm=False"),
    "Qwen2 without biases": ("qwen2", {"qkv_bias": False}, "attention.qkv_bias=True"),
    "half the biases": ("llama", {"qkv_bias": True}, "attention.qkv_bias and attention.output_bias"),
    "window in Llama": ("llama", {"window": 8}, "no sliding windows"),
    "bias in Mistral": ("mistral", {"output_bias": True}, "attention.output_bias=False"),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_a_model_that_its_family_cannot_express_is_not_written(tmp_path, case):
    family, changes, message = UNSAVEABLE[case]
    config = make_config(family)
    layer = config.layers[0]
    layers = (replace(layer, attention=replace(layer.attention, **changes)),) * 2
    with pytest.raises(HanlinError, match=message):
        save_model(Transformer(replace(config, layers=layers)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_layers_that_differ_are_not_written(tmp_path):
    config = make_config("qwen3")
    wide = replace(config.layers[0], feed_forward=FeedForwardConfig(128))
    with pytest.raises(HanlinError, match="differ"):
        save_model(Transformer(replace(config, layers=(config.layers[0], wide))), tmp_path / "x")


def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = saved(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    import hanlin.models.formats.safetensors as format_file

    def full(*_, **__):
        import errno

        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(format_file, "save_file", full)
    redraw(model)
    with pytest.raises(HanlinError, match="disk is full"):
        save_model(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_head_widths_that_transformers_refuses_for_llama_are_refused_here(tmp_path):
    with pytest.raises(HanlinError, match="divide"):
        save_model(Transformer(make_config("llama", width=66)), tmp_path / "x")
    save_model(Transformer(make_config("qwen3", width=66)), tmp_path / "y")
    assert load_theirs(tmp_path / "y").config.hidden_size == 66
