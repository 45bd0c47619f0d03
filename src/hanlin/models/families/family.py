"""A family is two tables: how its `config.json` maps to `ModelConfig` and back, how its weight names map to ours.

Every key of a `config.json` acts (`settings`, positions, windows), is known to change no number (`HARMLESS`), must have
the one value that this Transformer computes (`fixed`), or is refused by name. Nothing is ignored in silence. What is
written is read again and compared before it counts: a model that its family cannot express is refused too.

    config.json --settings--> values {"attention.heads": 8, ...} --finish--> ModelConfig of equal layers --shape-->
    ModelConfig
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families.keys import (
    COMMON,
    FIXED,
    HARMLESS,
    POSITIONS,
    WINDOWS,
    Setting,
    read_rope,
    read_setting,
    write_rope,
)
from hanlin.models.families.stored_heads import StoredHead
from hanlin.models.families.values import assemble, flatten, plain_values
from hanlin.models.families.weights import Bound, Rule, bind, match, renamed
from hanlin.models.families.windows import NO_WINDOWS, Windows

Values = dict[str, Any]  # dotted name of a field -> value


@dataclass(frozen=True)
class Family:
    """name: unique, and the `model_type` of the files unless that is given too, since two layouts may share one; then
    claims(json) says whether a `config.json` is of this one. architecture: the class with the language-model head,
    `also` what else files call it, and `bare` the class without a head.

    settings: keys that this family reads, beside those of `common` or instead of them (None takes one away). always:
    our fields that hold for every model of the family. fixed: keys with the one value that is computed, instead of
    those of `FIXED`. harmless: more keys that change no number; hooked: keys that the hooks below read and write.
    absent: token ids that transformers assumes where the file names none. windows: how `sliding_window` is said, see
    `Windows`. rotary: whether the layers have rotary positions, which `rope_parameters` describes. whole_heads: whether
    transformers loads only models whose width divides among the heads.

    finish(values, json): fills in values that follow from others. shape(config, json): turns a config of equal layers
    into one whose layers differ or that has an encoder. describe(config): the keys of `config.json` that say so.

    weights: (their name, our name) pairs and `Rule`s, see `models.families.weights`. alias(our name, config): the name
    by which `weights` speaks of a weight that stands among the layers there and elsewhere here. skipped: weights that
    files may hold and that are computed here or stand elsewhere too. prefix: of the names of all weights but the
    head's, which a file of a model without a head leaves off (and some old files of one with a head). heads: what files
    may hold beside the language model, see `models.families.stored_heads`. old_names: (end of a name, how old files end
    it).
    """

    name: str
    architecture: str
    bare: str | None = None
    also: tuple[str, ...] = ()
    model_type: str = ""
    claims: Callable[[Mapping[str, Any]], bool] | None = None
    settings: Mapping[str, Setting | None] = field(default_factory=dict)
    common: Mapping[str, Setting] = field(default_factory=lambda: COMMON)
    always: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    hooked: frozenset[str] = frozenset()
    absent: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows = NO_WINDOWS
    rotary: bool = True
    rope_default: float = 10_000.0
    whole_heads: bool = False
    finish: Callable[[Values, Mapping[str, Any]], None] | None = None
    shape: Callable[[ModelConfig, Mapping[str, Any]], ModelConfig] | None = None
    describe: Callable[[ModelConfig], dict[str, Any]] | None = None
    weights: tuple[tuple[str, str] | Rule, ...] = ()
    alias: Callable[[str, ModelConfig], str] | None = None
    skipped: tuple[str, ...] = ("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    prefix: str = ""
    heads: tuple[StoredHead, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_type", self.model_type or self.name)

    @property
    def keys(self) -> dict[str, Setting]:
        """Every key of `config.json` that sets a field of ours."""
        merged: dict[str, Setting | None] = {**self.common, **self.settings}
        return {key: setting for key, setting in merged.items() if setting is not None}

    def attention_traits(self) -> dict[str, Any]:
        """What the attention of every model of this family has, for those who make a new one."""
        mark = "attention."
        return {key.removeprefix(mark): value for key, value in self.always.items() if key.startswith(mark)}

    # -- config.json -> ModelConfig -------------------------------------------------------------------------------

    def read(self, json: Mapping[str, Any], file: Path) -> ModelConfig:
        """The `ModelConfig` of a parsed `config.json`; `file` is named in errors."""
        settings = self.keys
        self._refuse_unknown(json, settings, file)
        values: Values = dict(self.always)
        for key, setting in settings.items():
            value = read_setting(json, key, setting, file)
            values.update(dict.fromkeys(setting.ours, value))
        values["family"] = self.name
        values["init_std"] = values.get("init_std", 0.02)
        kept = HARMLESS | self.harmless
        extra = dict(self.absent) | {k: v for k, v in json.items() if k in kept and k not in settings}
        values["extra"] = {k: v for k, v in extra.items() if k not in ("architectures", "dtype", "torch_dtype")}
        if self._headless(json):
            values["head"] = None
        try:
            if self.rotary:
                self._read_rope(values, json, file)
            if self.finish is not None:
                self.finish(values, json)
            config = self.windows.read(assemble(values), json, file, self.name)
            return config if self.shape is None else self.shape(config, json)
        except HanlinError as error:
            if str(file) in str(error):
                raise
            raise HanlinError(f"{file}: {error}") from error

    def _read_rope(self, values: Values, json: Mapping[str, Any], file: Path) -> None:
        found = read_rope(json, file, default=self.rope_default)
        fraction = found.get("rope.fraction", 1.0)
        if fraction != 1.0 and "partial_rotary_factor" not in self.keys:
            raise HanlinError(
                f'{file}: "partial_rotary_factor" is {fraction}; in the family "{self.name}" the whole head turns.'
            )
        values |= found

    def _headless(self, json: Mapping[str, Any]) -> bool:
        return self.bare is not None and json.get("architectures") == [self.bare]

    def _refuse_unknown(self, json: Mapping[str, Any], settings: Mapping[str, Setting], file: Path) -> None:
        heads = json.get("architectures") or [self.architecture]
        if not any(name in heads for name in (self.architecture, *self.also)) and not self._headless(json):
            raise HanlinError(
                f'{file}: "architectures" is {heads}; Hanlin reads the language models of this family, '
                f"{self.architecture}, and no other head."
            )
        fixed = FIXED | dict(self.fixed)
        known = HARMLESS | self.harmless | self.hooked | {"model_type", *(POSITIONS if self.rotary else ()), *WINDOWS}
        for key, value in json.items():
            if key in settings or key in known or value is None:
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

    # -- ModelConfig -> config.json -------------------------------------------------------------------------------

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """`config.json` of a `ModelConfig`. What the family cannot express is a `HanlinError` that names it."""
        values = flatten(config)
        if self.whole_heads and config.width % values["attention.heads"]:
            raise HanlinError(
                f'In the family "{self.name}" the width must divide among the heads; {config.width} does not among '
                f"{values['attention.heads']}. Choose another width, or a family without this rule, such as qwen3."
            )
        architecture = self.bare if config.head is None and self.bare is not None else self.architecture
        json: dict[str, Any] = {"architectures": [architecture], "model_type": self.model_type}
        json |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        json |= {k: v for k, v in config.extra.items() if k in HARMLESS | self.harmless}
        for key, setting in self.keys.items():
            found = {plain_values(values[name]) for name in setting.ours if name in values}
            if len(found) > 1:
                raise HanlinError(f'The family "{self.name}" has one value for {" and ".join(setting.ours)}.')
            if found:
                json[key] = setting.written(found.pop())
        if self.rotary:
            json |= write_rope(config)
        if self.windows.kind != "none" or self.shape is None:  # else the hooks say them
            json |= self.windows.write(config, self.name)
        if self.describe is not None:
            json |= self.describe(config)
        self._refuse_what_is_lost(config, json)
        return json

    def _refuse_what_is_lost(self, config: ModelConfig, json: Mapping[str, Any]) -> None:
        """Read what would be written: it must say the same model."""
        again = self.read(json, Path("config.json"))
        if again == config:
            return
        meant, said = flatten(config), flatten(again)
        for name, value in meant.items():
            if said.get(name) != value:
                raise HanlinError(
                    f'A model of the family "{self.name}" always has {name}={said.get(name)!r}; this has {value!r}. '
                    "Choose another family for it."
                )
        for stack in ("layers", "encoder"):
            for index, (a, b) in enumerate(zip(getattr(config, stack), getattr(again, stack), strict=False)):
                if a != b:
                    raise HanlinError(
                        f'The family "{self.name}" cannot say how layer {index} ({stack}) differs from the others: it '
                        f"would be read back as {b}, and it is {a}."
                    )
        raise HanlinError(f'The family "{self.name}" cannot express this model: {config} would be read as {again}.')

    # -- weights --------------------------------------------------------------------------------------------------

    @property
    def rules(self) -> tuple[Rule, ...]:
        own = tuple(row if isinstance(row, Rule) else renamed(*row) for row in self.weights)
        return own + tuple(rule for head in self.heads for rule in head.rules)

    def bind(
        self, config: ModelConfig, ours: Mapping[str, tuple[int, ...]], *, bare: bool | None = None
    ) -> list[Bound]:
        """Which of their weights make which of ours (name -> shape). bare: their names lack `prefix`, as those of a
        model without a head do (None: as this config has one or not)."""
        known = {name if self.alias is None else self.alias(name, config): name for name in ours}
        found = bind(self.rules, {alias: ours[name] for alias, name in known.items()})
        if self.alias is not None:
            found = [replace(b, ours=tuple(known[alias] for alias in b.ours)) for b in found]
        bare = config.head is None if bare is None else bare
        if not bare or not self.prefix:
            return found
        return [replace(b, theirs=tuple(name.removeprefix(self.prefix) for name in b.theirs)) for b in found]

    def as_stored(self, bound: list[Bound], held: Collection[str]) -> list[Bound]:
        """The same with their names as a file that holds `held` spells them."""
        if not self.old_names:
            return bound
        return [replace(b, theirs=tuple(self._as_stored(name, held) for name in b.theirs)) for b in bound]

    def _as_stored(self, name: str, held: Collection[str]) -> str:
        old = (name.removesuffix(end) + was for end, was in self.old_names if name.endswith(end))
        return name if name in held else next((spelled for spelled in old if spelled in held), name)

    def is_skipped(self, theirs: str) -> bool:
        """Whether a weight in a file takes no part: it is computed here, or stands there under another name too."""
        names = (theirs, self.prefix + theirs)
        return any(match(template, name) is not None for template in self.skipped for name in names)

    def our_name(self, theirs: str) -> str | None:
        """Our name of a weight that is only renamed; None for one that takes no part."""
        if self.is_skipped(theirs):
            return None
        return self._rename(theirs, backwards=False)

    def their_name(self, ours: str) -> str:
        """The name under which our weight is saved, where it is only renamed."""
        return self._rename(ours, backwards=True)

    def _rename(self, name: str, *, backwards: bool) -> str:
        for rule in self.rules:
            source, target = (rule.ours, rule.theirs) if backwards else (rule.theirs, rule.ours)
            if len(source) == len(target) == 1 and (numbers := match(source[0], name)) is not None:
                return target[0].format(*numbers)
        return name
