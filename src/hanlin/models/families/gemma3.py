"""Gemma 3, text (arXiv:2503.19786): Gemma 2 with QK norm in the place of the soft-caps, five layers with a window for
each one without, and two rotary bases: 10,000 where there is a window, 1,000,000 (perhaps scaled) where there is
none."""

from collections.abc import Mapping
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families.family import Family
from hanlin.models.families.gemma2 import GEMMA2, scale_embedding
from hanlin.models.families.keys import Setting
from hanlin.models.families.values import map_layers, with_position
from hanlin.models.families.windows import FULL, SLIDING, Windows
from hanlin.nn.rope import Rope
from hanlin.nn.rope_scaling import scaling_from_json, scaling_to_json

BASES = {FULL: 1_000_000.0, SLIDING: 10_000.0}


def two_bases(config: ModelConfig, json: Mapping[str, Any]) -> ModelConfig:
    """Rotary positions by the kind of layer: `rope_parameters` has a table for each (before transformers 5:
    `rope_theta` and `rope_scaling` for layers without a window, `rope_local_base_freq` for those with one)."""
    tables = json.get("rope_parameters")
    if tables is None:
        whole = {"rope_theta": json.get("rope_theta", BASES[FULL]), **(json.get("rope_scaling") or {})}
        tables = {FULL: whole, SLIDING: {"rope_theta": json.get("rope_local_base_freq", BASES[SLIDING])}}
    if not isinstance(tables, dict) or not tables.keys() <= BASES.keys():
        raise HanlinError(f'"rope_parameters" is {tables!r}; it must have a table for each of {FULL} and {SLIDING}.')
    ropes = {}
    for kind, base in BASES.items():
        theta, scaling, _ = scaling_from_json(tables.get(kind) or {}, f'"rope_parameters.{kind}"')
        ropes[kind] = Rope(theta=base if theta is None else theta, scaling=scaling)
    return map_layers(config, lambda i, la: with_position(la, ropes[FULL if la.attention.window is None else SLIDING]))


def say_two_bases(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of the first layer of each kind."""
    tables = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in BASES.items()}
    for layer in reversed(config.layers):
        position = layer.attention.position
        if isinstance(position, Rope):
            kind = FULL if layer.attention.window is None else SLIDING
            tables[kind] = scaling_to_json(position.theta, position.scaling)
    return {"rope_parameters": tables}


GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    settings={**GEMMA2.settings, "max_position_embeddings": Setting(("max_positions",), int, 131072)},
    always={**GEMMA2.always, "attention.qk_norm": True},
    fixed=GEMMA2.fixed,
    hooked=frozenset({"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"}),
    harmless=frozenset({"sliding_window_pattern", "_sliding_window_pattern"}),
    absent=GEMMA2.absent,
    windows=Windows("types", 4096, every=6),
    rotary=False,
    finish=scale_embedding,
    shape=two_bases,
    describe=say_two_bases,
)
