"""T5 1.0 and 1.1, Switch Transformers, BART and Marian: an encoder beside a decoder, of different depths."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.models.cases import Case, Inputs, call_logits
from tests.models.oracle import save_theirs
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM
from transformers.models.bart import BartConfig
from transformers.models.marian import MarianConfig
from transformers.models.switch_transformers import SwitchTransformersConfig
from transformers.models.t5 import T5Config

T5 = {
    "vocab_size": 131, "d_model": 48, "d_kv": 10, "d_ff": 56, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3,
    "relative_attention_num_buckets": 10, "relative_attention_max_distance": 13, "decoder_start_token_id": 0,
    "attn_implementation": "eager",
}  # fmt: skip
SWITCH = T5 | {
    "num_layers": 3, "num_decoder_layers": 4, "num_experts": 4,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 2,
}  # fmt: skip
BART = {
    "vocab_size": 131, "d_model": 48, "max_position_embeddings": 40, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 6, "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 72,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    "attn_implementation": "eager",
}  # fmt: skip


def build(kind: Any, settings: dict[str, Any], *, head: bool = True) -> nn.Module:
    return (AutoModelForSeq2SeqLM if head else AutoModel).from_config(kind(**settings))


def build_wide(kind: Any, settings: dict[str, Any]) -> nn.Module:
    """T5 divides what its tied head reads by the root of the width: its token vectors are as much wider (`widen`)."""
    model = build(kind, settings)
    model.is_narrow = True
    return model


def widen(model: Any) -> None:
    """Once, after the weights are redrawn."""
    if getattr(model, "is_narrow", False):
        model.shared.weight.data *= model.shared.weight.shape[1] ** 0.5
        model.is_narrow = False


def build_t5(settings: dict[str, Any]) -> nn.Module:
    """With a head of its own, as the published v1.1 files have it; transformers ties whatever it makes itself."""
    model = build(T5Config, settings)
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    return model


def save_untied(model: Any, folder: Path) -> None:
    """As the published files say it: transformers writes `true` for all T5, whatever they hold."""
    save_theirs(model, folder)
    file = folder / "config.json"
    table = json.loads(file.read_text()) | {"tie_word_embeddings": False}
    del table["scale_decoder_outputs"], table["dense_act_fn"], table["is_gated_act"]
    file.write_text(json.dumps(table))


def build_marian(settings: dict[str, Any]) -> nn.Module:
    """Its table of positions is a frozen parameter, which no file holds: a buffer here, so that it is not redrawn."""
    model = build(MarianConfig, settings)
    for stack in (model.model.encoder, model.model.decoder):
        table = stack.embed_positions.weight.data
        del stack.embed_positions.weight
        stack.embed_positions.register_buffer("weight", table, persistent=False)
    return model


def call_wide(model: nn.Module, inputs: Inputs) -> Tensor:
    widen(model)
    return call_logits(model, inputs)


def call_switch(model: nn.Module, inputs: Inputs) -> Tensor:
    """Its routers keep fp32 whatever the model is cast to; in fp64 they are lifted too."""
    dtype = next(model.parameters()).dtype
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.dtype = dtype
    return call_wide(model, inputs)


def call_hidden(model: nn.Module, inputs: Inputs) -> Tensor:
    how = {"input_ids": inputs.source, "attention_mask": inputs.valid, "decoder_input_ids": inputs.ids}
    return model(**how).last_hidden_state


def case(name: str, family: str, build: Any, **more: Any) -> Case:
    return Case(name, family, build, kind="encoder-decoder", **{"reload_class": "AutoModelForSeq2SeqLM"} | more)


GATED = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SILU = GATED | {"feed_forward_proj": "gated-silu"}
NONE_AND_ALL = {"encoder_sparse_step": 0, "decoder_sparse_step": 1, "dense_act_fn": "gelu"}
ORIGINAL = {
    "d_model": 32, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 4, "encoder_ffn_dim": 72,
    "activation_function": "relu", "scale_embedding": True,
}  # fmt: skip
NO_HEAD: dict[str, Any] = {"call": call_hidden, "hidden": call_hidden, "reload_class": "AutoModel", "cached": False}


def t5(name: str, **changes: Any) -> Case:
    return case(name, "t5", partial(build_wide, T5Config, T5 | changes), call=call_wide)


def switch(name: str, *, cached: bool = True, **changes: Any) -> Case:
    build = partial(build_wide, SwitchTransformersConfig, SWITCH | changes)
    return case(name, "switch_transformers", build, call=call_switch, cached=cached)


def bart(name: str, **changes: Any) -> Case:
    return case(name, "bart", partial(build, BartConfig, BART | changes))


def marian(name: str, **changes: Any) -> Case:
    return case(name, "marian", partial(build_marian, BART | changes))


CASES = [
    t5("t5"),
    t5("t5-deep-encoder", num_layers=3, num_decoder_layers=1, d_kv=16),
    case("t5-own-head", "t5", partial(build_t5, T5 | {"tie_word_embeddings": False}), save=save_untied),
    case("t5-no-head", "t5", partial(build, T5Config, T5, head=False), **NO_HEAD),
    case("t5-v1.1", "t5-v1.1", partial(build_t5, GATED), save=save_untied),
    case("t5-v1.1-silu-tied", "t5-v1.1", partial(build, T5Config, SILU)),
    switch("switch"),
    # What an expert takes counts in each piece that a cache reads: only what is read in one piece is the whole.
    switch("switch-capacity", expert_capacity=3, router_bias=True, cached=False),
    switch("switch-none-and-all", **NONE_AND_ALL),
    bart("bart"),
    bart("bart-scaled", scale_embedding=True, activation_function="relu"),
    case("bart-no-head", "bart", partial(build, BartConfig, BART, head=False), **NO_HEAD),
    marian("marian", scale_embedding=True, activation_function="swish"),
    marian("marian-unscaled", encoder_layers=3, decoder_layers=1),
    marian("transformer", **ORIGINAL),  # as in the paper: 6 + 6 layers, ReLU, one size for both
]
