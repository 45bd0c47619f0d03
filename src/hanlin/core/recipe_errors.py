"""What a person reads when a recipe does not fit: one line a mistake, each with its place and its remedy.

recipes/x.yaml, line 7: unknown `train.lrr`; did you mean `train.lr`?
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hanlin.core.recipe_fields import KIND, kinds, leaves, sections
from hanlin.core.recipe_flags import annotation_at, suggest
from hanlin.core.recipe_yaml import Place, Source

AT_MOST = 5  # mistakes shown at once
READABLE = {
    "model_type": "should be a table of `key: value`",
    "model_attributes_type": "should be a table of `key: value`",
    "dict_type": "should be a table of `key: value`",
    "list_type": "should be a list",
    "string_type": "should be text (write it in quotes)",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "path_type": "should be a path",
}


def explain(
    error: ValidationError, model: type[BaseModel], tree: Mapping[str, Any], source: Source, flags: set[tuple[str, ...]]
) -> str:
    """All mistakes of a recipe as text. tree: what was checked; flags: the paths that the command line set."""
    details = sorted(
        error.errors(), key=lambda detail: detail["type"] != "extra_forbidden"
    )  # often the cause of others
    found = list(dict.fromkeys(_mistake(detail, model, tree, source, flags) for detail in details))
    more = [f"... and {len(found) - AT_MOST} more."] if len(found) > AT_MOST else []
    return "\n".join(found[:AT_MOST] + more)


def _mistake(
    detail: ErrorDetails, model: type[BaseModel], tree: Mapping[str, Any], source: Source, flags: set[tuple[str, ...]]
) -> str:
    kind = detail["type"]
    too_few = kind == "missing" and isinstance(detail["loc"][-1], int)  # of a tuple
    place = _place(detail["loc"], tree, missing=kind == "missing" and not too_few)
    path = tuple(map(str, place))
    dotted = ".".join(path)
    by_flag = any(path[:depth] in flags for depth in range(1, len(path) + 1))
    where = source.where(place)
    head = f"`--{dotted}`" if by_flag else f"{where}: `{dotted}`"
    if kind == "extra_forbidden":
        return f"{where}: unknown `{dotted}`{suggest(model, tree, path)}"
    if too_few:
        return f"{head} has too few values: {_short(detail['input'])}."
    if kind == "missing":
        return f"{source.where(place[:-1])}: `{dotted}` is missing{_remedy(model, tree, path)}."
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        section = _child(tree, place)
        value = section.get(KIND) if isinstance(section, Mapping) else None
        said = f"is {value!r}" if value is not None else "is missing"
        head = f"`--{dotted}.{KIND}`" if (*path, KIND) in flags else f"{where}: `{dotted}.{KIND}`"
        return f"{head} {said}; it is one of: {', '.join(_kinds(model, tree, path))}."
    if kind == "value_error":
        return f"{head if path else where}: {detail['msg'].removeprefix('Value error, ').rstrip('.')}."
    said = READABLE.get(kind) or detail["msg"].removeprefix("Input ").removeprefix("Value ")
    said = f"it {said}" if said.startswith("should") else f"{said[:1].lower()}{said[1:]}"
    return f"{head} is {_short(detail['input'])}; {said}."


def _place(loc: tuple[int | str, ...], tree: Any, *, missing: bool) -> Place:
    """pydantic's location without the union tags and types that it puts between the keys."""
    place: list[int | str] = []
    for number, key in enumerate(loc):
        last = number == len(loc) - 1
        inside = isinstance(tree, Mapping) and key in tree
        inside |= isinstance(tree, list) and isinstance(key, int) and key < len(tree)
        if inside:
            tree = tree[key]
            place.append(key)
        elif last and missing:
            place.append(key)
    return tuple(place)


def _remedy(model: type[BaseModel], tree: Mapping[str, Any], path: tuple[str, ...]) -> str:
    flag = f"--{'.'.join(path)}"
    if names := _kinds(model, tree, path):
        return f"; write it in the file or begin with `{flag}.{KIND}` {' or '.join(names)}"
    about = [leaf.info.description for leaf in leaves(model, tree) if leaf.path == path and leaf.info.description]
    return f"{f' ({about[0]})' if about else ''}; write it in the file or give `{flag}`"


def _kinds(model: type[BaseModel], tree: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    return [name for section in sections(annotation_at(model, tree, path)) for name in kinds(section)]


def _child(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
