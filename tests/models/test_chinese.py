"""Names that two layouts share, published configurations, and what of them is refused."""

import json
from typing import Any

import pytest
import torch
from tests.engine.paging import Book
from tests.models import twin_baichuan, twin_chatglm, twin_chatglm2, twin_qwen
from tests.models.cases import redraw_all

from hanlin.core.errors import HanlinError
from hanlin.models import Transformer, load_config
from hanlin.models.config import AlibiPosition, AttentionConfig, FeedForwardConfig, LatentAttentionConfig, ModelConfig
from hanlin.nn.masks import Causal, Padding, Prefix
from hanlin.nn.rope import Rope, block_positions

QWEN, SEVEN, THIRTEEN = twin_qwen.CONFIG, twin_baichuan.SEVEN, twin_baichuan.THIRTEEN
GLM, GLM2 = twin_chatglm.CONFIG, twin_chatglm2.CONFIG
LARGE = {"hidden_size": 4096, "num_attention_heads": 32}

# name: its keys, the family, how many parameters are published
PUBLISHED: dict[str, tuple[dict[str, Any], str, int]] = {
    "Qwen-7B": (
        QWEN | LARGE | {"intermediate_size": 22016, "num_hidden_layers": 32, "kv_channels": 128, "vocab_size": 151936},
        "qwen", 7_721_324_544,
    ),
    "Baichuan-7B": (
        SEVEN | LARGE | {"intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 64000},
        "baichuan", 7_000_559_616,
    ),
    "Baichuan-13B": (
        THIRTEEN | {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40,
                    "intermediate_size": 13696, "vocab_size": 64000},
        "baichuan-13b", 13_264_901_120,
    ),
    "ChatGLM-6B": (
        GLM | LARGE | {"inner_hidden_size": 16384, "num_layers": 28, "vocab_size": 130528},
        "chatglm", 6_173_286_400,
    ),
    "ChatGLM2-6B": (
        GLM2 | LARGE | {"ffn_hidden_size": 13696, "num_layers": 28, "kv_channels": 128, "padded_vocab_size": 65024},
        "chatglm2", 6_243_584_000,
    ),
}  # fmt: skip


def config_of(folder, keys: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(keys))
    return load_config(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_of_its_family_and_size(name, tmp_path):
    keys, family, parameters = PUBLISHED[name]
    config = config_of(tmp_path, keys)
    assert config.family == family and config.parameters().total == parameters


def test_the_two_baichuans_have_their_own_positions(tmp_path):
    assert config_of(tmp_path, SEVEN).layers[0].attention.position == Rope(10_000.0)
    assert config_of(tmp_path, THIRTEEN).layers[0].attention.position == AlibiPosition()


def test_token_ids_that_mark_the_prompt_are_kept(tmp_path):
    assert config_of(tmp_path, GLM).extra["gmask_token_id"] == 121


def without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Baichuan 2": (SEVEN | {"z_loss_weight": 0}, "z_loss_weight.*NormHead"),
    "Baichuan 2, 13B": (THIRTEEN | {"z_loss_weight": 0}, "z_loss_weight.*NormHead"),
    "another base": (SEVEN | {"rope_theta": 5e5}, "rope_theta"),
    "no length to scale from": (without(QWEN, "seq_length"), '"seq_length" is None.*"use_dynamic_ntk" and "use_logn'),
    "narrow heads": (QWEN | {"kv_channels": 8}, '"kv_channels" is 8'),
    "a switch that is none": (QWEN | {"use_logn_attn": "yes"}, "\"use_logn_attn\" is 'yes'"),
    "quantised cache": (QWEN | {"use_cache_quantization": True}, "use_cache_quantization"),
    "quantised weights": (GLM | {"quantization_bit": 4}, '"quantization_bit" is 4'),
    "a learnt prefix": (GLM | {"pre_seq_len": 128}, "pre_seq_len"),
    "one axis": (GLM | {"position_encoding_2d": False}, '"position_encoding_2d" is False'),
    "neither layout": (without(GLM, "inner_hidden_size", "position_encoding_2d"), '"chatglm".*nor "chatglm2"'),
    "queries apart": (GLM2 | {"multi_query_attention": False}, '"multi_query_attention" must be true'),
    "two sizes": (GLM2 | {"vocab_size": 130}, '"vocab_size" is 130 beside "padded_vocab_size" 131'),
    "two meanings": (GLM2 | {"rope_ratio": 4}, '"rope_ratio" is 4.*num_hidden_layers'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name, tmp_path):
    keys, message = REFUSED[name]
    with pytest.raises(HanlinError, match=message) as error:
        config_of(tmp_path, keys)
    assert "config.json" in str(error.value)


def test_block_positions_count_the_prompt_and_then_the_span():
    found = block_positions(torch.tensor([3, 4]), torch.tensor([2, 1]), 6)
    assert found[:, 0].tolist() == [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert found[:, 1].tolist() == [[0, 1, 2, 3, 1, 1], [0, 0, 0, 0, 1, 2]]


def small(attention: Any, **more: Any) -> Transformer:
    torch.manual_seed(3)
    config = ModelConfig.uniform(
        "qwen3", depth=2, attention=attention, feed_forward=FeedForwardConfig(24), vocab_size=40, width=16, **more
    )
    model = Transformer(config).eval()
    redraw_all(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("prefix", [5, (5, 2, 7)])
@pytest.mark.parametrize("window", [None, 4])
def test_a_prefix_read_in_one_piece_into_a_cache_is_the_whole_pass(prefix, window):
    model = small(AttentionConfig(4, 2, 8, window=window)).double()
    ids, mask = torch.randint(0, 40, (3, 14)), Prefix(prefix) | Causal()
    whole = model(ids, mask=mask).logits
    cache, parts, start = Book(model.config, sequences=3, length=14, dtype=torch.float64), [], 0
    for count in (8, 1, 1, 3, 1):
        piece = ids[:, start : start + count]
        parts.append(model(piece, mask=mask, cache=cache.step(range(3), count)).logits)
        start += count
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-10
    assert (model(ids).logits - whole).abs().max() > 1e-3


def test_masks_that_a_cache_cannot_honour_are_refused():
    model = small(AttentionConfig(4, 2, 8))
    ids = torch.zeros(1, 3, dtype=torch.int64)

    def read(model: Transformer, mask: Any) -> None:
        step = Book(model.config, sequences=1, length=8, dtype=torch.float32).step([0], 3)
        model(ids, mask=mask, cache=step)

    with pytest.raises(ValueError, match="see itself"):
        read(model, Padding(torch.ones(1, 3, dtype=torch.bool)))
    latent = LatentAttentionConfig(2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4)
    with pytest.raises(ValueError, match="plain attention"):
        read(small(latent), Prefix(2) | Causal())
