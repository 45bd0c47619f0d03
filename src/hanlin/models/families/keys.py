"""The keys of a `config.json` that families share: what each sets, which change no number, which have one value only.

`read_setting` and `read_rope` check a value and name the file and the key in their errors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ModelConfig
from hanlin.nn.activations import activation
from hanlin.nn.rope import Rope
from hanlin.nn.rope_scaling import scaling_from_json, scaling_to_json

REQUIRED = object()


@dataclass(frozen=True)
class Setting:
    """One key of `config.json`. ours: the fields that it sets, as `models.families.values` names them. default: the
    value where the key is absent, as transformers has it (None: follows from others). nullable: null too means that it
    follows from others. convert, back: from their value to ours, and from ours to theirs."""

    ours: tuple[str, ...]
    kind: type
    default: Any = REQUIRED
    nullable: bool = False
    convert: Callable[[Any], Any] | None = None
    back: Callable[[Any], Any] | None = None

    def written(self, value: Any) -> Any:
        """Our value as the file has it."""
        return value if self.back is None or value is None else self.back(value)


def known_activation(name: str) -> str:
    """The name, if `nn.activations` has it."""
    activation(name)
    return name


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
    "hidden_act": Setting(("feed_forward.activation",), str, "silu", convert=known_activation),
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
    """The checked value of one key in our terms, or the default where it is absent."""
    value = json.get(key)
    if value is None:
        if key in json and (setting.nullable or setting.default is None):
            return None
        if key in json or setting.default is REQUIRED:
            found = "null" if key in json else "missing"
            raise HanlinError(f'{file}: "{key}" is {found}; it must be {_words(setting.kind)}.')
        value = setting.default
    elif not _fits(value, setting.kind):
        raise HanlinError(f'{file}: "{key}" is {value!r}; it must be {_words(setting.kind)}.')
    if value is None:
        return None
    value = setting.kind(value)
    if setting.convert is None:
        return value
    try:
        return setting.convert(value)
    except (KeyError, ValueError, HanlinError) as error:
        raise HanlinError(f'{file}: "{key}" is {value!r}, which Hanlin does not know: {error}') from error


def _fits(value: Any, kind: type) -> bool:
    if kind in (bool, str, list):
        return isinstance(value, kind)
    numbers = (int, float) if kind is float else int
    return isinstance(value, numbers) and not isinstance(value, bool) and (value > 0 or (value == 0 and kind is float))


def read_count(json: Mapping[str, Any], key: str, default: int, *, least: int = 1) -> int:
    """A key that counts something; null and absent are the default."""
    value = json.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise HanlinError(f'"{key}" is {value!r}; it must be an integer of at least {least}.')
    return value


def read_integer(json: Mapping[str, Any], key: str, default: int, file: Path) -> int:
    """A key that holds an integer, whatever its sign."""
    value = json.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise HanlinError(f'{file}: "{key}" is {value!r}; it must be an integer.')
    return value


def _words(kind: type) -> str:
    return {
        "bool": "true or false", "int": "a positive integer", "float": "a positive number", "str": "a name",
        "list": "a list",
    }[kind.__name__]  # fmt: skip


def read_rope(json: Mapping[str, Any], file: Path, *, default: float) -> dict[str, Any]:
    """`rope.theta` and `rope.scaling` (and `rope.fraction`, how much of a head turns, where the file says so) from
    `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    found: dict[str, Any] = {}
    bases: dict[str, float] = {}
    for place in ("rope_parameters", "rope_scaling"):
        table = json.get(place) or {}
        if not isinstance(table, dict):
            raise HanlinError(f'{file}: "{place}" is {table!r}; it must be null or an object.')
        trained = json.get("original_max_position_embeddings")  # Phi-3 has it beside the table
        theta, scaling, fraction = scaling_from_json(table, f'{file}: "{place}"', trained=trained)
        if theta is not None:
            bases[f"{place}.rope_theta"] = theta
        if scaling is not None:
            found["rope.scaling"] = scaling
        if fraction is not None:
            found["rope.fraction"] = fraction
    if json.get("rope_theta") is not None:
        bases["rope_theta"] = json["rope_theta"]
    for place, value in bases.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise HanlinError(f'{file}: "{place}" is {value!r}; it must be a positive number.')
    if len(set(bases.values())) > 1:
        named = ", ".join(f'"{place}" {value:g}' for place, value in bases.items())
        raise HanlinError(f"{file} gives the rotary base more than once and differently: {named}. Keep one.")
    return {"rope.theta": float(next(iter(bases.values()), default)), **found}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_parameters` of the first layer that turns; nothing where none does."""
    position = next((p for layer in config.layers if isinstance(p := layer.attention.position, Rope)), None)
    if position is None:
        return {}
    part = None if position.dim is None else rope_fraction(config)
    width = next((a.head_dim for a in (la.attention for la in config.layers) if isinstance(a, AttentionConfig)), None)
    table = scaling_to_json(position.theta, position.scaling, fraction=part, dim=position.dim or width)
    return {"rope_theta": position.theta, "rope_parameters": table}


def rope_fraction(config: ModelConfig) -> float:
    """How much of a head turns, in the first layer that turns."""
    for layer in config.layers:
        a = layer.attention
        if isinstance(a, AttentionConfig) and isinstance(a.position, Rope):
            return 1.0 if a.position.dim is None else a.position.dim / a.head_dim
    return 1.0
