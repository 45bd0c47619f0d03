"""Flags over a recipe: `--train.lr 1e-3 --train.optimizer.kind muon --train.compile --no-objective.packing`.

A flag is the dotted path of a field. A list is written as words (`--objective.files a.json b.json`); a table or a list
of tables as YAML (`--mixture '{en: 0.9, zh: 0.1}'`) or by entry (`--mixture.en 0.9`). A new `kind` changes a section's
variant and drops what the file said for the other one. tyro turns the words into values and prints the help; the recipe
checks the whole afterwards, so a flag and a line of the file meet the same rules and the same messages.
"""

import contextlib
import copy
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hanlin.core.errors import HanlinError
from hanlin.core.recipe_fields import (
    KIND,
    alternatives,
    choose,
    default_of,
    element,
    is_list,
    is_plain,
    kinds,
    leaves,
    sections,
)

FieldPath = tuple[str, ...]


def apply_flags(
    model: type[BaseModel], tree: Mapping[str, Any], argv: Sequence[str], usage: str
) -> tuple[dict[str, Any], set[FieldPath]]:
    """The tree with the flags laid over it, and the paths that they set. `--help` prints every field and exits."""
    laid = copy.deepcopy(dict(tree))
    flags = split_flags(argv)
    for path in sorted(flags):  # a section's variant before those inside it
        if path[-1] == KIND and len(flags[path]) == 1:
            _change_variant(model, laid, path, flags[path][0])
    if "-h" in argv or "--help" in argv:
        print_help(model, laid, usage)
        raise SystemExit(0)
    plain: dict[FieldPath, Any] = {}
    for path in sorted(flags):  # a table before its entries
        annotation = annotation_at(model, laid, path)
        if annotation is None:
            raise HanlinError(_unknown_flag(model, laid, path, usage))
        if is_plain(annotation):
            plain[path] = annotation
        else:
            _put(laid, path, _yaml_value(path, flags[path]))
    for path, value in _read_words(plain, flags).items():
        _put(laid, path, value)
    return laid, set(flags)


def split_flags(argv: Sequence[str]) -> dict[FieldPath, list[str]]:
    """`["--a.b", "1", "--no-c", "--d=x"]` → `{("a", "b"): ["1"], ("c",): ["false"], ("d",): ["x"]}`."""
    flags: dict[FieldPath, list[str]] = {}
    current: list[str] | None = None
    for word in argv:
        if word in ("-h", "--help"):
            continue
        if not word.startswith("--"):
            if current is None:
                raise HanlinError(f"Unexpected `{word}`: only flags such as `--key.path value` can stand here.")
            current.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        switched_off = re.match(r"^(no_)?((?:.*\.)?)(?(1)|no_)([^.]+)$", name)
        path = tuple(name.split("."))
        if path in flags:
            raise HanlinError(f"`--{name}` is given twice; which one is meant?")
        current = [value] if equals else []
        if switched_off and not equals:
            path = tuple((switched_off[2] + switched_off[3]).split("."))
            current = ["false"]
        flags[path] = current
    return flags


def annotation_at(model: type[BaseModel], tree: Any, path: FieldPath) -> Any:
    """The type of the field, table entry or list element at `path`; None if a recipe with this tree has none there."""
    annotation: Any = model
    default: Any = None
    for key in path:
        chosen = choose(annotation, tree, default) or next(iter(sections(annotation)), None)
        if chosen is not None:
            info = chosen.model_fields.get(key)
            if info is None:
                return None
            if key == KIND:
                return one_of([kind for section in sections(annotation) for kind in kinds(section)])
            default = getattr(default, key) if isinstance(default, chosen) else default_of(info)
            annotation = info.annotation
        elif element(annotation, dict) is not None:
            annotation, default = element(annotation, dict), None
        elif key.isdigit() and isinstance(tree, list) and int(key) < len(tree):
            annotation, default = element(annotation, list), None
        else:
            return None
        tree = _child(tree, key)
    return annotation


def one_of(words: Sequence[str]) -> Any:
    """`Literal["a", "b"]` of words known only now."""
    literal: Any = Literal
    return literal[tuple(words)]


def print_help(model: type[BaseModel], tree: Mapping[str, Any], usage: str) -> None:
    """Every field with its type, description, example and present value, in tyro's layout."""
    import tyro

    annotated: Any = Annotated  # of types known only now
    view: dict[str, Any] = {}
    shown = [leaf for leaf in leaves(model, tree) if not _is_entry(model, tree, leaf.path)]
    for leaf in shown:
        found = _child_at(tree, leaf.path)
        value = leaf.default if found is None else found
        known: Any = annotation_at(model, tree, leaf.path) if leaf.path[-1] == KIND else leaf.annotation
        note = tyro.conf.arg(
            help="; ".join(filter(None, [leaf.info.description, *(f"e.g. {it}" for it in leaf.info.examples or ())])),
            help_behavior_hint="(required)" if value is PydanticUndefined else f"(default: {_word(value)})",
            metavar=None if is_plain(known) else "YAML",
        )
        section = view
        for key in leaf.path[:-1]:
            section = section.setdefault(key, {})
        section[leaf.path[-1]] = annotated[known if is_plain(known) else str, note]
    about = (model.__doc__ or "").strip()
    with contextlib.suppress(SystemExit):
        tyro.cli(_typed(view), args=["--help"], prog=usage, description=about, use_underscores=True)


def _typed(view: Mapping[str, Any]) -> Any:
    fields = {key: _typed(value) if isinstance(value, dict) else value for key, value in view.items()}
    make: Any = TypedDict  # made at run time, which no type checker can follow
    return make("Fields", fields, total=False)


def _read_words(plain: Mapping[FieldPath, Any], flags: Mapping[FieldPath, list[str]]) -> dict[FieldPath, Any]:
    values: dict[FieldPath, Any] = {}
    for path, annotation in plain.items():
        words = flags[path]
        if not words and set(alternatives(annotation)) <= {bool, type(None)}:
            values[path] = True
        elif is_list(annotation) or len(words) == 1:
            values[path] = _parse(annotation, words)
        else:
            found = f"{len(words)}: {' '.join(words)}" if words else "none"
            raise HanlinError(f"`--{'.'.join(path)}` takes one value; found {found}.")
    return values


def _parse(annotation: Any, words: list[str]) -> Any:
    """The words as a value of this type; as they are where they fit none (the recipe's check says why)."""
    import tyro

    if type(None) in alternatives(annotation) and words in (["None"], ["null"]):
        return None
    if bool in alternatives(annotation) or not words:
        return words[0] if words else []  # pydantic reads true/false, yes/no, on/off
    make: Any = annotation
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(tyro.conf.Positional[make], args=["--", *words], add_help=False)
    except SystemExit:
        return list(words) if is_list(annotation) else words[0]


def _change_variant(model: type[BaseModel], tree: dict[str, Any], path: FieldPath, kind: str) -> None:
    if annotation_at(model, tree, path) is None:
        return  # the flag is unknown; the caller says so
    section = _child_at(tree, path[:-1])
    if not isinstance(section, dict) or section.get(KIND) != kind:
        _put(tree, path[:-1], {KIND: kind}) if len(path) > 1 else tree.update({KIND: kind})


def _yaml_value(path: FieldPath, words: list[str]) -> Any:
    dotted = ".".join(path)
    if len(words) != 1:
        raise HanlinError(
            f"`--{dotted}` is a table or a list of tables: write it as one word of YAML, such as '{{key: value}}', "
            f"or set one entry with `--{dotted}.KEY value`."
        )
    try:
        return None if words[0] == "None" else yaml.safe_load(words[0])
    except yaml.YAMLError as error:
        raise HanlinError(f"`--{dotted} {words[0]}`: this is not valid YAML: {error}.") from None


def _unknown_flag(model: type[BaseModel], tree: Mapping[str, Any], path: FieldPath, usage: str) -> str:
    return f"Unknown flag `--{'.'.join(path)}`{suggest(model, tree, path, '--')} `{usage} --help` lists all of them."


def suggest(model: type[BaseModel], tree: Mapping[str, Any], path: Sequence[str], dashes: str = "") -> str:
    """`; did you mean `train.lr`?`: the nearest field of the section, or one of that name elsewhere; or all."""
    known = {leaf.path for leaf in leaves(model, tree, every=True)}
    known |= {leaf[:depth] for leaf in known for depth in range(1, len(leaf))}
    beside = {place[-1]: place for place in known if place[:-1] == tuple(path[:-1])}
    if tuple(path) in known:
        return _other_variant(model, tree, tuple(path))
    near = difflib.get_close_matches(path[-1], beside, n=1, cutoff=0.6)
    whole = {".".join(place): place for place in sorted(known)}
    places = [place for place in sorted(known) if place[-1] == path[-1]] or [beside[name] for name in near]
    if not places:
        places = [whole[name] for name in difflib.get_close_matches(".".join(path), whole, n=1, cutoff=0.75)]
    if places:
        return f"; did you mean `{dashes}{'.'.join(places[0])}`?"
    return f"; known here: {', '.join(sorted(beside))}." if beside else "."


def _other_variant(model: type[BaseModel], tree: Mapping[str, Any], path: FieldPath) -> str:
    for depth in range(len(path) - 1, 0, -1):
        found = sections(annotation_at(model, tree, path[:depth]))
        names = [kind for section in found for kind in kinds(section) if path[depth] in section.model_fields]
        if len(found) > 1 and names:
            chosen = f"{'.'.join(path[:depth])}.{KIND}"
            return f": it belongs to `{chosen}` {' or '.join(names)}."
    return "."


def _is_entry(model: type[BaseModel], tree: Mapping[str, Any], path: FieldPath) -> bool:
    """Whether a path goes through a list or a dictionary."""
    around = (annotation_at(model, tree, path[:depth]) for depth in range(1, len(path)))
    return any(element(annotation, list) or element(annotation, dict) for annotation in around)


def _word(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, list | tuple) and not any(isinstance(item, dict) for item in value):
        return " ".join(map(str, value)) if value else "none"
    return str(value)


def _child(tree: Any, key: str) -> Any:
    if isinstance(tree, Mapping):
        return tree.get(key)
    if isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
        return tree[int(key)]
    return None


def _child_at(tree: Any, path: FieldPath) -> Any:
    for key in path:
        tree = _child(tree, key)
    return tree


def _put(tree: dict[str, Any], path: FieldPath, value: Any) -> None:
    node: Any = tree
    for key in path[:-1]:
        if isinstance(node, list):
            node = node[int(key)]
        else:
            if not isinstance(node.get(key), dict | list):
                node[key] = {}
            node = node[key]
    if isinstance(node, list):
        node[int(path[-1])] = value
    else:
        node[path[-1]] = value
