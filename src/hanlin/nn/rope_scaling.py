"""Reading further than a rotary model was trained to: other frequencies for the same weights.

Pair i of a head of D dimensions turns by `position * theta^(-2i/D)`. Each way of extending the context is a small
frozen value that is called for the frequencies it gives instead, and for a factor on cosine and sine:

    direct            theta^(-2i/D)                                             arXiv:2104.09864
    linear            / factor: positions squeezed into the trained range       arXiv:2306.15595
    ntk               theta * factor^(D/(D-2)): slow pairs squeezed, fast ones hardly   arXiv:2309.00071, section 3.1
    dynamic           the same, with the factor that this length needs          arXiv:2309.00071, section 3.3
    yarn              a ramp from untouched (fast) to squeezed (slow), and a temperature   arXiv:2309.00071, section 3
    llama3            a ramp in wavelength; no temperature                      arXiv:2407.21783
    longrope          a searched factor for each pair, two sets by length       arXiv:2402.13753
    base              another theta, then training goes on ("ABF")              arXiv:2309.16039
    proportional      a part of the pairs does not turn at all                  transformers' Gemma 4

`SCALINGS` lists them. Arithmetic is fp32, in the order of transformers' `ROPE_INIT_FUNCTIONS`: both have equal bits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError

Length = int | Tensor | None
Frequencies = tuple[Tensor, float]


def inverse_frequencies(head_dim: int, theta: float | Tensor, pairs: int | None = None) -> Tensor:
    """theta^(-2i/D) for i < D/2 (or the first `pairs`), fp32, (D / 2,); theta (rows, 1) -> (rows, D / 2)."""
    exponent = torch.arange(0, head_dim if pairs is None else 2 * pairs, 2, dtype=torch.float32) / head_dim
    if isinstance(theta, Tensor):
        exponent = exponent.to(theta.device)
    return 1.0 / theta**exponent


@dataclass(frozen=True)
class RopeScaling:
    """Called with the dimensions that turn and the base -> (inverse frequencies fp32, factor on cosine and sine).

    length: the longest position + 1, on which `by_length` scalings depend: an int or None -> (dim / 2,), one for each
    row (rows, 1) -> (rows, dim / 2). longest: the positions the model's config names (`max_position_embeddings`).
    """

    by_length: ClassVar[bool] = False

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        return inverse_frequencies(dim, theta), 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check(f"{type(self).__name__}: ", field.name, value)


@dataclass(frozen=True)
class Linear(RopeScaling):
    """Position interpolation: every position divided by `factor`."""

    factor: float

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        return inverse_frequencies(dim, theta) / self.factor, 1.0


@dataclass(frozen=True)
class NtkAware(RopeScaling):
    """The base grows so that the slowest pair is squeezed by `factor` and the fastest not at all."""

    factor: float

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        return inverse_frequencies(dim, ntk_theta(dim, theta, self.factor)), 1.0


@dataclass(frozen=True)
class DynamicNtk(RopeScaling):
    """NTK-aware with the factor `factor * length / longest - (factor - 1)`: 1 up to the trained length `longest`.

    A pure function of the length of this pass: keys that a cache turned earlier keep the base of their own pass.
    """

    factor: float
    by_length: ClassVar[bool] = True

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        trained = _known(self, "max_position_embeddings", longest)
        if not isinstance(length, Tensor):
            return inverse_frequencies(dim, self._theta(dim, theta, max(length or 0, trained), trained)), 1.0
        within = self._theta(dim, theta, trained, trained)  # fp64, as for an int: short rows stay unscaled
        beyond = self._theta(dim, theta, length.clamp(min=trained), trained)
        return inverse_frequencies(dim, torch.where(length > trained, beyond, within)), 1.0

    def _theta(self, dim: int, theta: float, length: Any, trained: int) -> Any:
        return ntk_theta(dim, theta, (self.factor * length / trained) - (self.factor - 1))


@dataclass(frozen=True)
class Yarn(RopeScaling):
    """Pairs that turn more than `beta_fast` times within the trained length stay, those that turn less than `beta_slow`
    times are squeezed by `factor`, between them a ramp over the index, rounded outwards to whole pairs if `truncate`.

    The scores' temperature stands in cosine and sine: 0.1 ln(factor) + 1, or `attention_factor`; with DeepSeek's
    `mscale` and `mscale_all_dim` the quotient of the two, `score_scale` being the rest. factor None: longest / trained.
    """

    factor: float | None = None
    trained: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.beta_fast or 32) < (self.beta_slow or 1):
            raise HanlinError(
                f"Yarn: beta_fast is {self.beta_fast or 32:g} and beta_slow {self.beta_slow or 1:g} (turns within the "
                "trained length); the fast pairs must turn more often."
            )

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        if theta <= 1:
            raise HanlinError(f"Yarn needs pairs that turn slower and slower: the base is {theta:g}, expected above 1.")
        trained = _known(self, "original_max_position_embeddings", self.trained, longest)
        factor = self.factor if self.factor is not None else _known(self, "factor", longest) / trained

        def pair_of(turns: float) -> float:  # that turns so often within the trained length
            return (dim * math.log(trained / (turns * 2 * math.pi))) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast or 32), pair_of(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001  # a step, not 0 / 0
        kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        inverse = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
        if self.attention_factor is not None:
            return inverse, self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return inverse, yarn_temperature(factor, self.mscale) / yarn_temperature(factor, self.mscale_all_dim)
        return inverse, yarn_temperature(factor)

    @property
    def score_scale(self) -> float:
        """What DeepSeek's attention multiplies its scores by beside head_dim^-0.5 (1 without `mscale_all_dim`)."""
        if not self.mscale_all_dim:
            return 1.0
        return yarn_temperature(_known(self, "factor", self.factor), self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Llama3(RopeScaling):
    """Wavelengths below trained / high_freq_factor stay, those above trained / low_freq_factor are squeezed by
    `factor`; between them the two are mixed."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise HanlinError(
                f"Llama3: low_freq_factor is {self.low_freq_factor:g} and high_freq_factor {self.high_freq_factor:g}; "
                "the second must be larger."
            )

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        trained = _known(self, "original_max_position_embeddings", self.trained, longest)
        low, high = self.low_freq_factor, self.high_freq_factor
        plain = inverse_frequencies(dim, theta)
        wavelength = 2 * math.pi / plain
        is_long, is_short = wavelength > trained / low, wavelength < trained / high
        inverse = torch.where(is_long, plain / self.factor, plain)
        share = (trained / wavelength - low) / (high - low)  # of the plain frequency
        mixed = (1 - share) * inverse / self.factor + share * inverse
        return torch.where(is_long | is_short, inverse, mixed), 1.0


@dataclass(frozen=True)
class LongRope(RopeScaling):
    """A divisor for each pair: `short_factor` up to the trained length, `long_factor` for a pass that goes further.

    Cosine and sine times sqrt(1 + ln(factor) / ln(trained)), or `attention_factor`. factor None: longest / trained.
    Keys turned before a sequence grew past `trained` do not fit those after it: compute them again.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float | None = None
    trained: int | None = None
    attention_factor: float | None = None
    by_length: ClassVar[bool] = True

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        trained = _known(self, "original_max_position_embeddings", self.trained, longest)
        for name, values in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(values) != dim // 2:
                raise HanlinError(
                    f"LongRope: {name} has {len(values)} numbers; {dim} dimensions turn, so it must have {dim // 2}."
                )
        short, long = torch.tensor(self.short_factor), torch.tensor(self.long_factor)
        if isinstance(length, Tensor):
            divisors = torch.where(length > trained, long.to(length.device), short.to(length.device))
        else:
            divisors = long if length is not None and length > trained else short
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=divisors.device) / dim
        return 1.0 / (divisors * theta**exponent), self._temperature(trained, longest)

    def _temperature(self, trained: int, longest: int | None) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor if self.factor is not None else _known(self, "factor", longest) / trained
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


@dataclass(frozen=True)
class BaseConversion(RopeScaling):
    """The base is `theta` in the place of the one the model began with."""

    theta: float

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        return inverse_frequencies(dim, self.theta), 1.0


@dataclass(frozen=True)
class Proportional(RopeScaling):
    """Of the D/2 pairs the first `fraction` turn, with the frequencies of the whole head, divided by `factor`."""

    fraction: float = 1.0
    factor: float = 1.0

    def __call__(self, dim: int, theta: float, length: Length = None, longest: int | None = None) -> Frequencies:
        turning = int(self.fraction * dim // 2)
        inverse = inverse_frequencies(dim, theta, turning) / self.factor
        return torch.cat([inverse, torch.zeros(dim // 2 - turning)]), 1.0


SCALINGS: dict[str, type[RopeScaling]] = {
    "default": RopeScaling,
    "linear": Linear,
    "ntk": NtkAware,
    "dynamic": DynamicNtk,
    "yarn": Yarn,
    "llama3": Llama3,
    "longrope": LongRope,
    "base": BaseConversion,
    "proportional": Proportional,
}


def ntk_theta(dim: int, theta: float, factor: Any) -> Any:
    """The base at which the slowest of dim / 2 pairs is slower by `factor`: theta * factor^(dim / (dim - 2))."""
    if dim <= 2:
        raise HanlinError(f"NTK-aware scaling needs more than one pair that turns; {dim} dimensions do.")
    return theta * factor ** (dim / (dim - 2))


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1 (arXiv:2309.00071, eq. 22); 1 where nothing is squeezed."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_ALIASES = {"su": "longrope"}  # Phi-3's first files
_JSON_KEYS = {"trained": "original_max_position_embeddings", "fraction": "partial_rotary_factor"}
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "trained": (lambda x: type(x) is int and x > 0, "a positive integer"),
    "truncate": (lambda x: type(x) is bool, "true or false"),
    "fraction": (lambda x: _is_number(x) and x <= 1, "a number from 0 to 1"),
    "mscale": (lambda x: _is_number(x), "a number, not negative"),
    "mscale_all_dim": (lambda x: _is_number(x), "a number, not negative"),
    "short_factor": (lambda x: isinstance(x, tuple) and all(map(_is_positive, x)), "a list of positive numbers"),
    "long_factor": (lambda x: isinstance(x, tuple) and all(map(_is_positive, x)), "a list of positive numbers"),
}  # any other field: a positive number


def scaling_from_json(
    table: Mapping[str, Any], where: str, *, trained: int | None = None
) -> tuple[float | None, RopeScaling | None, float | None]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (before) -> (rope_theta, scaling, partial_rotary_factor),
    each None where the table has none. Null values count as absent.

    where: the file and the key, for messages. trained: an `original_max_position_embeddings` that stands beside the
    table (Phi-3) and wins. A type or a key that would not act raises `HanlinError`.
    """
    kinds = {key: table[key] for key in ("rope_type", "type") if table.get(key) is not None}
    if len({_ALIASES.get(str(kind), kind) for kind in map(str, kinds.values())}) > 1:
        raise HanlinError(f'{where}: "rope_type" is {kinds["rope_type"]!r} and "type" {kinds["type"]!r}. Keep one.')
    kind = str(next(iter(kinds.values()), "default"))
    kind = _ALIASES.get(kind, kind)
    if kind not in SCALINGS:
        raise HanlinError(f"{where}: the rope type {kind!r} is unknown. Known are: {', '.join(SCALINGS)}.")
    rest = {key: value for key, value in table.items() if key not in ("rope_type", "type") and value is not None}
    theta, fraction = rest.pop("rope_theta", None), None
    if theta is not None:
        _check(f"{where}: ", "rope_theta", theta)
    ours = {_key(field.name): field for field in fields(SCALINGS[kind])}
    if "partial_rotary_factor" not in ours and "partial_rotary_factor" in rest:
        fraction = rest.pop("partial_rotary_factor")
        _check(f"{where}: ", "fraction", fraction)
    if trained is not None and "original_max_position_embeddings" in ours:
        rest["original_max_position_embeddings"] = trained
    if unknown := sorted(rest.keys() - ours.keys()):
        known = ", ".join(["rope_theta", "partial_rotary_factor", *(key for key in ours if key not in rest)])
        raise HanlinError(
            f"{where}: {', '.join(map(repr, unknown))} would not act: the rope type {kind!r} does not know it. "
            f"It knows: {known}."
        )
    needed = {key for key, field in ours.items() if field.default is MISSING}
    if missing := sorted(needed - rest.keys()):
        raise HanlinError(f"{where}: the rope type {kind!r} needs {', '.join(map(repr, missing))}.")
    values = {ours[key].name: tuple(v) if isinstance(v, list) else v for key, v in rest.items()}
    try:
        scaling = SCALINGS[kind](**values)
    except HanlinError as error:
        raise HanlinError(f"{where}: {error}") from None
    return theta, None if kind == "default" else scaling, fraction


def scaling_to_json(
    theta: float, scaling: RopeScaling | None, *, fraction: float | None = None, dim: int | None = None
) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 reads it. fraction: `partial_rotary_factor`. dim: the dimensions that turn.

    What transformers has no name for is a plain rotary embedding of another base and is written as that: a base
    conversion, and NTK-aware scaling, which needs `dim` for it.
    """
    if isinstance(scaling, BaseConversion):
        theta, scaling = scaling.theta, None
    if isinstance(scaling, NtkAware):
        if dim is None:
            raise HanlinError("NTK-aware scaling is written as its base, which depends on the dimensions: give `dim`.")
        theta, scaling = ntk_theta(dim, theta, scaling.factor), None
    kind = next((name for name, cls in SCALINGS.items() if cls is type(scaling or RopeScaling())), None)
    if kind is None:
        raise HanlinError(f"{scaling} has no name in `rope_parameters`; choose a family whose config.json can say it.")
    table: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if fraction is not None:
        table["partial_rotary_factor"] = fraction
    for field in fields(scaling) if scaling is not None else ():
        value = getattr(scaling, field.name)
        if field.default is MISSING or value != field.default:
            table[_key(field.name)] = list(value) if isinstance(value, tuple) else value
    return table


def _key(name: str) -> str:
    """A field's name in JSON."""
    return _JSON_KEYS.get(name, name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _check(where: str, name: str, value: Any) -> None:
    fits, words = _KINDS.get(name, (_is_positive, "a positive number"))
    if not fits(value):
        raise HanlinError(f'{where}"{_key(name)}" is {value!r}; it must be {words}.')


def _known(scaling: RopeScaling, name: str, *values: Any) -> Any:
    """The first value that is given."""
    for value in values:
        if value is not None:
            return value
    raise HanlinError(f"{type(scaling).__name__} needs {name!r}: neither the scaling nor the model gives it.")
