"""The keys of a `config.json` that families share: what each sets, which change no number, which have one value only.

`read_setting` and `read_rotary_base` check a value and name the file and the key in their errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError

REQUIRED = object()


@dataclass(frozen=True)
class Setting:
    """One key of `config.json`. ours: the fields of `ModelConfig` that it sets, `attention.` and `feed_forward.` for
    those of every layer. default: the value where the key is absent, as transformers has it (None: follows from
    others). nullable: null too means that it follows from others."""

    ours: tuple[str, ...]
    kind: type
    default: Any = REQUIRED
    nullable: bool = False


COMMON: dict[str, Setting] = {
    "vocab_size": Setting(("vocab_size",), int),
    "hidden_size": Setting(("width",), int),
    "intermediate_size": Setting(("feed_forward.hidden",), int),
    "num_hidden_layers": Setting(("depth",), int),
    "num_attention_heads": Setting(("attention.heads",), int),
    "num_key_value_heads": Setting(("attention.kv_heads",), int, None),
    "head_dim": Setting(("attention.head_dim",), int, None),
    "max_position_embeddings": Setting(("max_positions",), int),
    "rms_norm_eps": Setting(("norm_eps",), float, 1e-6),
    "initializer_range": Setting(("init_std",), float, 0.02),
    "tie_word_embeddings": Setting(("tied_embeddings",), bool, False),
}

# Keys whose value cannot change a logit: bookkeeping, generation defaults of old files, switches of foreign code.
_HARMLESS = """
    _name_or_path _attn_implementation _attn_implementation_autoset _commit_hash architectures auto_map dtype
    torch_dtype transformers_version transformers.js_config is_llama_config use_cache use_bfloat16 torchscript
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class
    attention_dropout hidden_dropout pretraining_tp gradient_checkpointing
    id2label label2id num_labels problem_type finetuning_task prefix task_specific_params
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    chunk_size_feed_forward max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values begin_suppress_tokens
    suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty tf_legacy_loss
    max_window_layers
"""
HARMLESS = frozenset(_HARMLESS.split())

FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "mlp_bias": False,
    "attention_bias": False,
    "pruned_heads": {},
}

POSITIONS = ("rope_parameters", "rope_scaling", "rope_theta")
WINDOWS = ("sliding_window", "use_sliding_window", "layer_types")


def read_setting(json: Mapping[str, Any], key: str, setting: Setting, file: Path) -> Any:
    """The checked value of one key, or the default where it is absent."""
    value = json.get(key)
    if value is None:
        if key in json and (setting.nullable or setting.default is None):
            return None
        if key in json or setting.default is REQUIRED:
            found = "null" if key in json else "missing"
            raise HanlinError(f'{file}: "{key}" is {found}; it must be {_words(setting.kind)}.')
        return setting.default
    kind = setting.kind
    if kind is bool:
        good = isinstance(value, bool)
    else:
        numbers = (int, float) if kind is float else int
        good = (
            isinstance(value, numbers) and not isinstance(value, bool) and (value > 0 or (value == 0 and kind is float))
        )
    if not good:
        raise HanlinError(f'{file}: "{key}" is {value!r}; it must be {_words(kind)}.')
    return kind(value)


def read_integer(json: Mapping[str, Any], key: str, default: int, file: Path) -> int:
    """A key that holds an integer, whatever its sign."""
    value = json.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise HanlinError(f'{file}: "{key}" is {value!r}; it must be an integer.')
    return value


def _words(kind: type) -> str:
    return "true or false" if kind is bool else "a positive integer" if kind is int else "a positive number"


def read_rotary_base(json: Mapping[str, Any], file: Path) -> float:
    """The rotary base, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    found: dict[str, float] = {}
    for place in ("rope_parameters", "rope_scaling"):
        table = json.get(place) or {}
        if not isinstance(table, dict):
            raise HanlinError(f'{file}: "{place}" is {table!r}; it must be null or an object.')
        for key, value in table.items():
            if key in ("rope_type", "type") and value == "default":
                continue
            if key == "rope_theta":
                found[f"{place}.rope_theta"] = value
            elif not (key == "partial_rotary_factor" and value == 1.0):
                raise HanlinError(
                    f'{file}: "{place}" has "{key}": {value!r}. Hanlin has plain rotary positions (rope_type '
                    '"default") and no scaled, partial or per-layer kind.'
                )
    if json.get("rope_theta") is not None:
        found["rope_theta"] = json["rope_theta"]
    for place, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise HanlinError(f'{file}: "{place}" is {value!r}; it must be a positive number.')
    if len(set(found.values())) > 1:
        named = ", ".join(f'"{place}" {value:g}' for place, value in found.items())
        raise HanlinError(f"{file} gives the rotary base more than once and differently: {named}. Keep one.")
    return float(next(iter(found.values()), 10_000.0))
