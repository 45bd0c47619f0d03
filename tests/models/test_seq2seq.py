"""What the files of T5, Switch Transformers, BART and Marian say, and what is refused of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.cases import inputs_of, reference_model
from tests.models.cases_seq2seq import CASES
from tests.models.oracle import save_theirs
from tests.models.ours import run_ours
from transformers.models.switch_transformers import SwitchTransformersConfig

from hanlin.core.errors import HanlinError
from hanlin.models import load_config, load_model, save_model
from hanlin.models.accounting import count_flops
from hanlin.models.config import BucketPosition, ExpertsConfig, ModelConfig
from hanlin.models.families.switch_transformers import SWITCH_TRANSFORMERS
from hanlin.models.transformer import Transformer

CASE = {case.name: case for case in CASES}
# Keys as published files have them: t5-small, t5-v1_1-small, bart-large-cnn, opus-mt-en-de (sizes made small).
T5_SMALL = {
    "architectures": ["T5WithLMHeadModel"], "d_ff": 64, "d_kv": 8, "d_model": 32, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_heads": 4, "num_layers": 3,
    "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32, "vocab_size": 131,
    "task_specific_params": {"summarization": {"num_beams": 4}},
}  # fmt: skip
T5_V11_SMALL = T5_SMALL | {
    "architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
BART_CNN = {
    "_num_labels": 3, "activation_dropout": 0.0, "activation_function": "gelu", "add_final_layer_norm": False,
    "architectures": ["BartForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 0,
    "classif_dropout": 0.0, "d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "decoder_layerdrop": 0.0, "decoder_layers": 2, "decoder_start_token_id": 2, "dropout": 0.1,
    "early_stopping": True, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "encoder_layerdrop": 0.0,
    "encoder_layers": 3, "eos_token_id": 2, "force_bos_token_to_be_generated": True, "forced_bos_token_id": 0,
    "id2label": {"0": "LABEL_0"}, "init_std": 0.02, "is_encoder_decoder": True, "label2id": {"LABEL_0": 0},
    "length_penalty": 2.0, "max_position_embeddings": 40, "model_type": "bart", "no_repeat_ngram_size": 3,
    "normalize_before": False, "num_beams": 4, "num_hidden_layers": 3, "output_past": True, "pad_token_id": 1,
    "scale_embedding": False, "use_cache": True, "vocab_size": 131,
}  # fmt: skip
OPUS = {
    "activation_dropout": 0.0, "activation_function": "swish", "add_bias_logits": False, "add_final_layer_norm": False,
    "architectures": ["MarianMTModel"], "bad_words_ids": [[130]], "bos_token_id": 0, "d_model": 32,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "decoder_layers": 6, "decoder_start_token_id": 130,
    "decoder_vocab_size": 131, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "encoder_layers": 6,
    "eos_token_id": 0, "forced_eos_token_id": 0, "init_std": 0.02, "is_encoder_decoder": True, "max_length": 512,
    "max_position_embeddings": 40, "model_type": "marian", "normalize_before": False, "normalize_embedding": False,
    "num_beams": 6, "num_hidden_layers": 6, "pad_token_id": 130, "scale_embedding": True,
    "share_encoder_decoder_embeddings": True, "static_position_embeddings": True, "vocab_size": 131,
}  # fmt: skip
SWITCH = {"model_type": "switch_transformers", "vocab_size": 131, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4}


def read(table: dict[str, Any], folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(table))
    return load_config(folder)


def test_t5_files_of_both_layouts_are_told_apart(tmp_path):
    old, new = read(T5_SMALL, tmp_path), read(T5_V11_SMALL, tmp_path)
    assert (old.family, new.family) == ("t5", "t5-v1.1")
    assert len(old.layers) == len(old.encoder) == 3 and len(new.layers) == 2
    assert (old.layers[0].feed_forward.activation, new.layers[0].feed_forward.activation) == ("relu", "gelu_new")
    assert old.tied_embeddings and old.head is not None and old.head.input_scale == 32**-0.5
    assert not new.tied_embeddings and new.head is not None and new.head.input_scale == 1
    assert old.layers[0].attention.position == BucketPosition(32, 128)


@pytest.mark.parametrize("table", [T5_SMALL, T5_V11_SMALL, BART_CNN, OPUS], ids=["t5", "t5-v1.1", "bart", "marian"])
def test_published_keys_are_read_and_written_back(table, tmp_path):
    config = read(table, tmp_path)
    save_model(Transformer(config), tmp_path / "ours")
    assert load_model(tmp_path / "ours").config == config
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    switches = {"normalize_before", "normalize_embedding", "add_final_layer_norm", "add_bias_logits"}
    aliases = {"num_hidden_layers", "architectures", "static_position_embeddings"}
    for key, value in table.items():
        assert key in switches | aliases or ours[key] == value, key


def test_files_that_hold_the_token_vectors_more_than_once_are_read(tmp_path):
    case = CASE["t5"]
    theirs = reference_model(case)
    save_theirs(theirs, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights["shared.weight"].clone()
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(10, 4)
    save_file(weights, file, metadata={"format": "pt"})
    inputs = inputs_of(case)
    with torch.no_grad():
        torch.testing.assert_close(
            run_ours(case, load_model(tmp_path), inputs).logits, case.call(theirs, inputs), rtol=0, atol=5e-5
        )


def test_v11_as_transformers_5_writes_it_is_read_once_its_head_is_called_its_own(tmp_path):
    """transformers 5 writes `"tie_word_embeddings": true` whatever a T5 holds."""
    case = CASE["t5-v1.1"]
    theirs = reference_model(case)
    save_theirs(theirs, tmp_path)
    with pytest.raises(HanlinError, match="tie_word_embeddings"):
        load_model(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    assert table["scale_decoder_outputs"] is False
    (tmp_path / "config.json").write_text(json.dumps(table | {"tie_word_embeddings": False}))
    inputs = inputs_of(case)
    with torch.no_grad():
        torch.testing.assert_close(
            run_ours(case, load_model(tmp_path), inputs).logits, case.call(theirs, inputs), rtol=0, atol=5e-5
        )


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("sparse", [0, 1, 2, 3, 8])
def test_switch_has_its_experts_where_transformers_has_them(depth, sparse, tmp_path):
    keys = {"num_layers": depth, "num_decoder_layers": depth, "num_sparse_encoder_layers": sparse}
    step = SwitchTransformersConfig(**keys).encoder_sparse_step
    expected = [(i % step == 1 or step == 1) if step > 0 else False for i in range(depth)]
    config = read(SWITCH | keys, tmp_path)
    assert [isinstance(layer.feed_forward, ExpertsConfig) for layer in config.encoder] == expected
    written = SWITCH_TRANSFORMERS.write(config)
    assert read(written, tmp_path) == config
    assert written["num_sparse_encoder_layers"] == sum(expected)


def test_experts_in_odd_places_cannot_be_said(tmp_path):
    config = read(SWITCH | {"num_layers": 4, "num_decoder_layers": 4, "encoder_sparse_step": 2}, tmp_path)
    moved = replace(config, encoder=(*config.encoder[1:], config.encoder[0]))
    with pytest.raises(HanlinError, match="every n-th layer"):
        SWITCH_TRANSFORMERS.write(moved)


@pytest.mark.parametrize(
    ("table", "changes", "named"),
    [
        (T5_SMALL, {"feed_forward_proj": "double-relu"}, "feed_forward_proj"),
        (T5_SMALL, {"feed_forward_proj": "reluu"}, "reluu"),
        (T5_SMALL, {"is_gated_act": "yes"}, "is_gated_act"),
        (T5_SMALL, {"scale_decoder_outputs": 1}, "scale_decoder_outputs"),
        (T5_SMALL, {"num_layers": 0}, "num_layers"),
        (T5_SMALL, {"relative_attention_max_distance": -1}, "relative_attention_max_distance"),
        (T5_SMALL, {"is_encoder_decoder": False}, "is_encoder_decoder"),
        (T5_SMALL, {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        (SWITCH, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        (SWITCH, {"router_dtype": "bfloat16"}, "router_dtype"),
        (SWITCH, {"encoder_sparse_step": -2}, "encoder_sparse_step"),
        (SWITCH, {"expert_capacity": 0}, "expert_capacity"),
        (BART_CNN, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        (BART_CNN, {"num_hidden_layers": 2}, "num_hidden_layers"),
        (BART_CNN, {"encoder_attention_heads": 5}, "5 heads"),
        (BART_CNN, {"normalize_before": True}, "normalize_before"),
        (BART_CNN, {"scale_embedding": 2}, "scale_embedding"),
        (OPUS, {"decoder_vocab_size": 90}, "decoder_vocab_size"),
        (OPUS, {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        (OPUS, {"static_position_embeddings": False}, "static_position_embeddings"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(table, changes, named, tmp_path):
    with pytest.raises(HanlinError, match=named) as error:
        read(table | changes, tmp_path)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("name", ["t5", "switch", "bart", "marian"])
def test_a_model_without_an_encoder_is_refused(name):
    case = CASE[name]
    from hanlin.models.families import FAMILIES

    family = FAMILIES[case.family]
    config = family.read({"model_type": family.model_type}, Path("config.json"))
    alone = replace(config, encoder=(), layers=tuple(replace(layer, cross_attention=None) for layer in config.layers))
    with pytest.raises(HanlinError, match="has an encoder beside its decoder"):
        family.write(alone)


def test_flops_of_a_token_count_the_cross_attention(tmp_path):
    config, length = read(BART_CNN, tmp_path), 24
    whole = count_flops(config, 1, length, pairs="all").training
    assert config.flops_per_token(length) == pytest.approx(whole / length)
