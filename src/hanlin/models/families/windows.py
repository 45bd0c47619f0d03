"""How a `config.json` says which layers have a sliding window: `sliding_window`, `use_sliding_window`,
`layer_types`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, ModelConfig
from hanlin.models.families.keys import read_integer

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Windows:
    """kind "none": no layer may have a window; "all": one for all layers; "types": `layer_types` alone says which have
    one, by default every layer but each `every`-th (Gemma, gpt-oss); "hooked": the family's hooks read and write the
    keys. Where `use_sliding_window` must be true for any: "switched" for all layers (Qwen3-MoE); "each" from layer
    `max_window_layers` on (Qwen2), "below" for every second layer before it (Qwen2-MoE), unless `layer_types` says
    otherwise. default: the size where the file names none."""

    kind: Literal["none", "all", "types", "hooked", "switched", "each", "below"]
    default: int | None = None
    every: int = 2

    def read(self, config: ModelConfig, json: Mapping[str, Any], file: Path, name: str) -> ModelConfig:
        """The config with the windows that the file gives to its layers."""
        if self.kind == "hooked":
            return config
        depth, switched = len(config.layers), self.kind in ("switched", "each", "below")
        size = json.get("sliding_window", self.default)
        if switched and not json.get("use_sliding_window", False):
            size = None
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise HanlinError(f'{file}: "sliding_window" is {size!r}; it must be null or an integer of at least 1.')
        if size is not None and self.kind == "none":
            raise HanlinError(f'{file}: "sliding_window" is {size!r}; the family "{name}" has no windows.')
        switch = json.get("use_sliding_window")
        if not switched and switch is not None and switch != (size is not None):
            raise HanlinError(
                f'{file}: "use_sliding_window" is {switch!r} beside a "sliding_window" of {size}; in the family '
                f'"{name}" the size alone decides. Delete the switch, or set the size accordingly.'
            )
        types = self._types(json, size, depth, file, name)
        if FULL not in types or SLIDING in types:
            layers = zip(config.layers, types, strict=True)
            sized = tuple(_with_window(layer, size if kind == SLIDING else None) for layer, kind in layers)
            return replace(config, layers=sized)
        return config

    def _types(self, json: Mapping[str, Any], size: int | None, depth: int, file: Path, name: str) -> list[str]:
        first = read_integer(json, "max_window_layers", 28, file) if self.kind in ("each", "below") else 0
        if self.kind == "types":
            plain = [SLIDING if (i + 1) % self.every else FULL for i in range(depth)]
        elif self.kind == "below":
            plain = [FULL if size is None or i >= first or i % 2 else SLIDING for i in range(depth)]
        else:
            plain = [FULL if size is None or i < first else SLIDING for i in range(depth)]
        types = json.get("layer_types")
        if types is None:
            return plain
        if not isinstance(types, list) or len(types) != depth:
            raise HanlinError(f'{file}: "layer_types" must be a list of {depth} names, one a layer; found {types!r}.')
        for index, kind in enumerate(types):
            known = kind == FULL or (kind == SLIDING and size is not None)
            if not known or (self.kind in ("none", "all", "switched") and kind != plain[index]):
                raise HanlinError(
                    f'{file}: "layer_types" gives layer {index} as {kind!r}, with a "sliding_window" of {size} in use; '
                    f'Hanlin cannot honour that for the family "{name}".'
                )
        return types

    def write(self, config: ModelConfig, name: str) -> dict[str, Any]:
        """The keys that say the windows of a config."""
        if self.kind == "hooked":
            return {}
        windows = [layer.attention.window for layer in config.layers]
        sizes = {w for w in windows if w is not None}
        if self.kind == "none":
            if sizes:
                raise HanlinError(
                    f'The family "{name}" has no sliding windows; "mistral", "qwen2" and "qwen3" have them.'
                )
            return {}
        uniform = self.kind in ("all", "switched")
        if len(sizes) > 1 or (uniform and sizes and None in windows):
            allowed = "one window for all layers" if uniform else "one size of window"
            raise HanlinError(f'The family "{name}" has {allowed}; this model has {windows}.')
        size = next(iter(sizes), None)
        if self.kind == "all":
            return {"sliding_window": size}
        types = {"layer_types": [FULL if w is None else SLIDING for w in windows]}
        if self.kind == "types":
            return types | {"sliding_window": size or self.default}
        json: dict[str, Any] = {"use_sliding_window": size is not None, "sliding_window": size}
        if self.kind == "switched":
            return json
        first = next((i for i, w in enumerate(windows) if w is not None), len(windows))
        if self.kind == "each" and size is not None and all(windows[first:]):  # else `layer_types` alone can say it
            json["max_window_layers"] = first
        return json | types


NO_WINDOWS = Windows("none")


def _with_window(layer: Any, size: int | None) -> Any:
    if not isinstance(layer.attention, AttentionConfig):
        raise HanlinError(f"Only plain attention has windows; this layer's is {type(layer.attention).__name__}.")
    return replace(layer, attention=replace(layer.attention, window=size))
