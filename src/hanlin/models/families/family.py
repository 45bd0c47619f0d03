"""A family is two tables: how its `config.json` maps to `ModelConfig` and back, how its weight names map to ours.

Every key of a `config.json` acts (`settings`, positions, windows), is known to change no number (`HARMLESS`), must have
the one value that this Transformer computes (`fixed`), or is refused by name. Nothing is ignored in silence.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hanlin.models.families.keys import (
    COMMON,
    FIXED,
    HARMLESS,
    POSITIONS,
    WINDOWS,
    Setting,
    read_integer,
    read_rotary_base,
    read_setting,
)


@dataclass(frozen=True)
class Family:
    """name: the `model_type`. settings: keys that this family reads beside or instead of `COMMON`. always: our fields
    that hold for every model of the family. windows: whether layers may have a sliding window ("all": one for all
    layers; "each": layer by layer). fixed: keys with the one value that is computed, instead of those of `FIXED`.
    absent: token ids that transformers assumes where the file names none. whole_heads: whether transformers loads only
    models whose width divides among the heads, though `head_dim` is free.

    weights: (their name, our name) templates in which `{}` stands for a number; a weight that no row matches has the
    same name on both sides. skipped: weights that old files hold and that are computed here.
    """

    name: str
    architecture: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    windows: Literal["none", "all", "each"] = "none"
    default_window: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    whole_heads: bool = False
    weights: tuple[tuple[str, str], ...] = ()
    skipped: tuple[str, ...] = ("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

    # -- config.json -> ModelConfig -------------------------------------------------------------------------------

    def read(self, json: Mapping[str, Any], file: Path) -> ModelConfig:
        """The `ModelConfig` of a parsed `config.json`; `file` is named in errors."""
        settings = COMMON | dict(self.settings)
        self._refuse_unknown(json, settings, file)
        values: dict[str, Any] = dict(self.always)
        for key, setting in settings.items():
            value = read_setting(json, key, setting, file)
            values.update(dict.fromkeys(setting.ours, value))
        if values["attention.kv_heads"] is None:
            values["attention.kv_heads"] = values["attention.heads"]
        if values["attention.head_dim"] is None:
            if values["width"] % values["attention.heads"]:
                raise HanlinError(
                    f'{file}: "hidden_size" {values["width"]} does not divide among "num_attention_heads" '
                    f'{values["attention.heads"]}, and there is no "head_dim" that says how wide a head is.'
                )
            values["attention.head_dim"] = values["width"] // values["attention.heads"]
        depth = values.pop("depth")
        attention = AttentionConfig(**_under("attention.", values))
        feed_forward = FeedForwardConfig(**_under("feed_forward.", values))
        windows = self._read_windows(json, depth, file)
        extra = dict(self.absent) | {k: v for k, v in json.items() if k in HARMLESS and k not in settings}
        try:
            return ModelConfig(
                family=self.name,
                layers=tuple(LayerConfig(replace(attention, window=w), feed_forward) for w in windows),
                rope_theta=read_rotary_base(json, file),
                extra={k: v for k, v in extra.items() if k not in ("architectures", "dtype", "torch_dtype")},
                **{k: v for k, v in values.items() if "." not in k},
            )
        except HanlinError as error:
            raise HanlinError(f"{file}: {error}") from error

    def _refuse_unknown(self, json: Mapping[str, Any], settings: Mapping[str, Setting], file: Path) -> None:
        heads = json.get("architectures") or [self.architecture]
        if self.architecture not in heads:
            raise HanlinError(
                f'{file}: "architectures" is {heads}; Hanlin reads the language models of this family, '
                f"{self.architecture}, and no other head."
            )
        fixed = FIXED | dict(self.fixed)
        for key, value in json.items():
            if key in settings or key in HARMLESS or key in (*POSITIONS, *WINDOWS, "model_type") or value is None:
                continue
            if key not in fixed:
                raise HanlinError(
                    f'{file}: "{key}" (here {value!r}) is no setting that Hanlin knows for the family "{self.name}", '
                    "so it cannot tell whether the numbers would be right. If it is only a note, delete it there."
                )
            if value != fixed[key]:
                raise HanlinError(
                    f'{file}: "{key}" is {value!r}; for the family "{self.name}" Hanlin computes only {fixed[key]!r}.'
                )

    def _read_windows(self, json: Mapping[str, Any], depth: int, file: Path) -> list[int | None]:
        """The window of each layer, or None."""
        size = json.get("sliding_window", self.default_window)
        if self.windows == "each" and not json.get("use_sliding_window", False):
            size = None
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise HanlinError(f'{file}: "sliding_window" is {size!r}; it must be null or an integer of at least 1.')
        if size is not None and self.windows == "none":
            raise HanlinError(f'{file}: "sliding_window" is {size!r}; the family "{self.name}" has no windows.')
        switch = json.get("use_sliding_window")
        if self.windows != "each" and switch is not None and switch != (size is not None):
            raise HanlinError(
                f'{file}: "use_sliding_window" is {switch!r} beside a "sliding_window" of {size}; in the family '
                f'"{self.name}" the size alone decides. Delete the switch, or set the size accordingly.'
            )
        first = read_integer(json, "max_window_layers", 28, file) if self.windows == "each" else 0
        plain = ["full_attention" if size is None or i < first else "sliding_attention" for i in range(depth)]
        types = json.get("layer_types")
        if types is None:
            types = plain
        if not isinstance(types, list) or len(types) != depth:
            raise HanlinError(f'{file}: "layer_types" must be a list of {depth} names, one a layer; found {types!r}.')
        for index, kind in enumerate(types):
            known = kind == "full_attention" or (kind == "sliding_attention" and size is not None)
            if not known or (self.windows != "each" and kind != plain[index]):
                raise HanlinError(
                    f'{file}: "layer_types" gives layer {index} as {kind!r}, with a "sliding_window" of {size} in use; '
                    f'Hanlin cannot honour that for the family "{self.name}".'
                )
        return [size if kind == "sliding_attention" else None for kind in types]

    # -- ModelConfig -> config.json -------------------------------------------------------------------------------

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """`config.json` of a `ModelConfig`. What the family cannot express is a `HanlinError` that names it."""
        layer = config.layers[0]
        plain = {replace(part, attention=replace(part.attention, window=None)) for part in config.layers}
        if len(plain) > 1:
            raise HanlinError(
                f'The family "{self.name}" has layers that differ in nothing but their window; these differ in more.'
            )
        if self.whole_heads and config.width % layer.attention.heads:
            raise HanlinError(
                f'In the family "{self.name}" the width must divide among the heads; {config.width} does not among '
                f"{layer.attention.heads}. Choose another width, or a family without this rule, such as qwen3."
            )
        values: dict[str, Any] = {"depth": len(config.layers)}
        values |= {k: v for k, v in vars(config).items() if k not in ("family", "layers", "extra", "rope_theta")}
        values |= {f"attention.{k}": v for k, v in vars(layer.attention).items() if k != "window"}
        values |= {f"feed_forward.{k}": v for k, v in vars(layer.feed_forward).items()}

        settings = COMMON | dict(self.settings)
        json: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        json |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        json |= {k: v for k, v in config.extra.items() if k in HARMLESS}
        for key, setting in settings.items():
            found = {values.pop(name) for name in setting.ours}
            if len(found) > 1:
                raise HanlinError(f'The family "{self.name}" has one value for {" and ".join(setting.ours)}.')
            json[key] = found.pop()
        for name, value in values.items():  # what no key of this family can say
            expected = self.always.get(name, False)
            if value != expected:
                raise HanlinError(
                    f'A model of the family "{self.name}" always has {name}={expected!r}; this one has {value!r}. '
                    "Choose another family for it."
                )
        json["rope_theta"] = config.rope_theta  # for readers before transformers 5
        json["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"}
        json["hidden_act"] = "silu"
        return json | self._write_windows([part.attention.window for part in config.layers])

    def _write_windows(self, windows: list[int | None]) -> dict[str, Any]:
        sizes = {w for w in windows if w is not None}
        if self.windows == "none" and sizes:
            raise HanlinError(
                f'The family "{self.name}" has no sliding windows; "mistral", "qwen2" and "qwen3" have them.'
            )
        if len(sizes) > 1 or (self.windows == "all" and len(set(windows)) > 1):
            raise HanlinError(f'The family "{self.name}" cannot express the windows {windows}.')
        size = next(iter(sizes), None)
        if self.windows == "none":
            return {}
        if self.windows == "all":
            return {"sliding_window": size}
        json: dict[str, Any] = {"use_sliding_window": size is not None, "sliding_window": size}
        first = windows.index(size)
        if size is not None and all(windows[first:]):  # else `layer_types` alone can say it
            json["max_window_layers"] = first
        return json | {"layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows]}

    # -- weight names ---------------------------------------------------------------------------------------------

    def our_name(self, theirs: str) -> str | None:
        """Our name of a weight in a file of this family; None for one that is computed here."""
        if any(_match(template, theirs) for template in self.skipped):
            return None
        return _rename(theirs, self.weights)

    def their_name(self, ours: str) -> str:
        """The name under which our weight is saved."""
        return _rename(ours, tuple((b, a) for a, b in self.weights))


def _match(template: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(template).replace(r"\{\}", r"(\d+)"), name)


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for source, target in table:
        found = _match(source, name)
        if found:
            return target.format(*found.groups())
    return name


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
