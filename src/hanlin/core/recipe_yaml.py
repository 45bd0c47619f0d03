"""A recipe's YAML file: its plain tree, and the line on which each key stands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hanlin.core.errors import HanlinError

Place = tuple[str | int, ...]  # ("train", "lr"); a list's elements by number


@dataclass(frozen=True)
class Source:
    """What was read. tree: nested dicts, lists and scalars; lines: the 1-based line of each key; path None: no file."""

    path: Path | None = None
    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[Place, int] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """`recipes/x.yaml, line 7` for the key at `place`, or of the nearest key around it that the file has."""
        if self.path is None:
            return "The recipe"
        for depth in range(len(place), 0, -1):
            if place[:depth] in self.lines:
                return f"{self.path}, line {self.lines[place[:depth]]}"
        return str(self.path)


def read_recipe(path: Path) -> Source:
    """Read a YAML file. Missing, not UTF-8, not YAML, a key twice, no table of keys: `HanlinError` with the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise HanlinError(f"There is no recipe {path}.{_beside(path)}") from None
    except IsADirectoryError:
        raise HanlinError(f"{path} is a folder; a recipe is a YAML file.{_beside(path / 'x')}") from None
    except UnicodeDecodeError as error:
        raise HanlinError(f"{path} is not UTF-8 text (byte {error.start}); save the recipe as UTF-8.") from None
    loader = yaml.SafeLoader(text)
    lines: dict[Place, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return Source(path)
        if not isinstance(node, yaml.MappingNode):
            raise HanlinError(f"{path}, line {node.start_mark.line + 1}: a recipe is a table of `key: value` lines.")
        _note_lines(node, (), lines, path, frozenset())
        return Source(path, loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise HanlinError(f"{path}{line}: this is not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise HanlinError(f"{path} is not valid YAML: {error}.") from None
    finally:
        loader.dispose()


def write_recipe(tree: dict[str, Any]) -> str:
    """A plain tree as YAML that reads back the same; Chinese stays readable."""
    return yaml.dump(tree, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """YAML counts U+0085, U+2028 and U+2029 as line ends, which PyYAML forgets outside double quotes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        quoted = any(character in data for character in "\x85\u2028\u2029\ufeff")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path, above: frozenset[int]) -> None:
    if id(node) in above:
        raise HanlinError(f"{path}, line {node.start_mark.line + 1}: an alias that contains itself.")
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, str(key.value))
            line = key.start_mark.line + 1
            if here in lines and key.value != "<<":
                dotted = ".".join(map(str, here))
                raise HanlinError(f"{path}, line {line}: `{dotted}` stands here again (first on line {lines[here]}).")
            lines[here] = line
            _note_lines(value, here, lines, path, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*place, index] = value.start_mark.line + 1
            _note_lines(value, (*place, index), lines, path, above)


def _beside(path: Path) -> str:
    import difflib

    names = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {path.parent / near[0]}?"
    return f" In {path.parent} there are: {', '.join(names)}." if names else ""
