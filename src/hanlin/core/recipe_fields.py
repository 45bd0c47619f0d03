"""What a recipe's fields are: a walk over pydantic models and their annotations, beside a plain tree of values.

A union of sections is resolved by the tree's `kind`, then by the default, then by the keys that are there.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

KIND = "kind"  # the field that names a section's variant
SCALARS = (bool, int, float, str, Path)


@dataclass(frozen=True)
class Leaf:
    """A field that is no section. path: ("train", "lr"); default: `PydanticUndefined` where a value must be given."""

    path: tuple[str, ...]
    annotation: Any
    info: FieldInfo
    default: Any

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """A union's members, flat, without `Annotated`; None as `NoneType`. Anything else is its only member."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(part for member in get_args(annotation) for part in alternatives(member))
    return (annotation,)


def sections(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The sections among a union's members."""
    return tuple(a for a in alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel))


def element(annotation: Any, container: type) -> Any:
    """The X of `list[X]` or `dict[str, X]`; None if the annotation has no such container."""
    for member in alternatives(annotation):
        if get_origin(member) is container:
            return get_args(member)[-1]
    return None


def kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of a section's `kind`, empty if it has none."""
    info = model.model_fields.get(KIND)
    return get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()


def choose(annotation: Any, tree: Any, default: Any) -> type[BaseModel] | None:
    """Which section a tree is. None: the annotation has no section, or the keys fit none or several of them."""
    known = sections(annotation)
    keys = set(tree) if isinstance(tree, Mapping) else set()
    if KIND in keys and any(kinds(model) for model in known):
        return next((model for model in known if tree[KIND] in kinds(model)), None)
    fitting = [model for model in known if keys <= set(model.model_fields)]
    preferred = [model for model in fitting if isinstance(default, model)]
    if len(known) == 1:
        return known[0]
    if preferred or len(fitting) == 1:
        return (preferred or fitting)[0]
    return None


def default_of(info: FieldInfo) -> Any:
    """A field's default value, or `PydanticUndefined`."""
    if info.default_factory is not None and info.default_factory_takes_validated_data:
        return PydanticUndefined
    return info.get_default(call_default_factory=True)


def fill_defaults(model: type[BaseModel], tree: Mapping[str, Any], default: Any = None) -> dict[str, Any]:
    """The tree with `kind`s and the non-trivial defaults of its sections written in.

    pydantic gives a section that is mentioned its class's defaults; here it keeps those of the field's default value
    (`schedule: WSD = WSD(decay=0.2)` and `schedule: {floor: 0.1}` → decay 0.2, floor 0.1). Unknown keys stay.
    """
    filled = dict(tree)
    for name, info in model.model_fields.items():
        given = isinstance(default, model) and name in default.model_fields_set
        inherited = getattr(default, name) if given else default_of(info)
        if name not in tree:
            if given:
                filled[name] = inherited.model_dump() if isinstance(inherited, BaseModel) else inherited
        elif isinstance(tree[name], Mapping) and sections(info.annotation):
            filled[name] = _fill_section(info.annotation, tree[name], inherited)
        elif isinstance(tree[name], Mapping) and sections(inner := element(info.annotation, dict)):
            filled[name] = {key: _fill_section(inner, value, None) for key, value in tree[name].items()}
        elif isinstance(tree[name], list) and sections(inner := element(info.annotation, list)):
            filled[name] = [_fill_section(inner, value, None) for value in tree[name]]
    return filled


def _fill_section(annotation: Any, tree: Any, default: Any) -> Any:
    chosen = choose(annotation, tree, default) if isinstance(tree, Mapping) else None
    if chosen is None:
        return tree
    kind = {KIND: kinds(chosen)[0]} if kinds(chosen) and KIND not in tree else {}
    return fill_defaults(chosen, {**kind, **tree}, default if isinstance(default, chosen) else None)


def leaves(
    model: type[BaseModel], tree: Any, default: Any = None, path: tuple[str, ...] = (), *, every: bool = False
) -> Iterator[Leaf]:
    """Every field below a section that is no section itself, in order; list and dict elements that the tree has, too.

    every: walk all the variants of a union, not only the chosen one.
    """
    tree = tree if isinstance(tree, Mapping) else {}
    for name, info in model.model_fields.items():
        inherited = getattr(default, name) if isinstance(default, model) else default_of(info)
        here, value, known = (*path, name), tree.get(name), sections(info.annotation)
        if known:
            chosen = choose(info.annotation, value, inherited) or known[0]
            for section in known if every else (chosen,):
                yield from leaves(section, value, inherited, here, every=every)
            continue
        yield Leaf(here, info.annotation, info, inherited)
        inside = element(info.annotation, list) if isinstance(value, list) else element(info.annotation, dict)
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, Mapping) else ()
        for key, item in items if sections(inside) else ():
            chosen = choose(inside, item, None) or sections(inside)[0]
            yield from leaves(chosen, item, None, (*here, str(key)), every=every)


def is_plain(annotation: Any) -> bool:
    """Whether a value can be written as words of a command line: scalars, choices, and lists or tuples of them."""
    for member in alternatives(annotation):
        if get_origin(member) in (list, tuple):
            if not all(part is Ellipsis or is_plain(part) for part in get_args(member)):
                return False
        elif not (member in SCALARS or member is type(None) or get_origin(member) is Literal):
            return False
    return True


def is_list(annotation: Any) -> bool:
    """Whether several words make one value."""
    return any(get_origin(member) in (list, tuple) for member in alternatives(annotation))
