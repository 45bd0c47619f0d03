"""Documentation out of source files, without importing them: one `Document` a docstring.

    torch.nn.Linear(in_features, out_features, bias=True, device=None, dtype=None)

    Applies an affine linear transformation to the incoming data ...

The head is the qualified name with its signature, the body the cleaned docstring, so that the facts a reader may ask
for stand in the text itself. Functions written in C have no source: `compiled_documents` asks the imported objects.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hanlin.quickstart.clean import clean_docstring

LONGEST_SIGNATURE = 240  # characters
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Document:
    """One text. name: qualified name; kind: module, class, function, topic or passage; head: name with signature;
    body: prose; group: what the split into train and held-out keeps together."""

    name: str
    kind: str
    head: str
    body: str
    group: str

    @property
    def text(self) -> str:
        """Head and body; a passage that begins with its title does not say it twice."""
        return self.body if self.body.startswith(self.head) else f"{self.head}\n\n{self.body}"

    def row(self) -> dict[str, str]:
        """The line of a jsonl file; `text` is what a model reads."""
        return {"name": self.name, "kind": self.kind, "head": self.head, "group": self.group, "text": self.text}

    @classmethod
    def from_row(cls, row: dict[str, str]) -> "Document":
        body = row["text"].removeprefix(f"{row['head']}\n\n")
        return cls(row["name"], row["kind"], row["head"], body, row["group"])


@dataclass(frozen=True)
class SourceFile:
    """A file of a package and the dotted name of the module that it is."""

    path: Path
    module: str

    @property
    def group(self) -> str:
        """The top-level submodule: `torch.nn` for torch/nn/modules/linear.py, `json` for json/decoder.py."""
        return top_submodule(self.module)


def top_submodule(module: str) -> str:
    """Standard library: its first name (`json`); installed packages: the first two (`torch.nn`)."""
    import sys

    parts = module.split(".")
    return parts[0] if parts[0] in sys.stdlib_module_names else ".".join(parts[:2])


def read_file(file: SourceFile) -> list[Document]:
    """All documented modules, classes and functions of one source file; none if Python cannot parse it."""
    try:
        source = file.path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes are not our user's concern
            tree = ast.parse(source)
    except (SyntaxError, ValueError, UnicodeDecodeError, OSError):
        return []
    found = []
    body = clean_docstring(ast.get_docstring(tree) or "")
    if body:
        found.append(Document(file.module, "module", file.module, body, file.group))
    found.extend(_definitions(tree.body, file.module, file.group))
    return found


def signature_of(node: Definition) -> str:
    """`(input, dim=0, *, keepdim=False)`: names and defaults, without annotations and without `self`.

    A class shows its `__init__`; a class without one, and a default that is a long expression, show `...`.
    """
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return _parameters(inits[0].args, bound=True) if inits else ""
    decorators = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
    first = node.args.args[0].arg if node.args.args else ""
    return _parameters(node.args, bound=first in ("self", "cls") and "staticmethod" not in decorators)


def compiled_documents(namespaces: Sequence[str]) -> list[Document]:
    """Documents of what the source does not show: functions and types written in C of the named modules (`builtins`,
    `math`, `torch` ...), their methods, and docstrings that are set at run time. Modules that are not there are passed
    over; what the ast walk has found too is for `deduplicate` to drop."""
    found: dict[str, Document] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at a deprecated name warns
        for name in namespaces:
            for document in _namespace(name):
                found.setdefault(document.name, document)
    return list(found.values())


def public_names(namespaces: Sequence[str]) -> dict[str, str]:
    """Where things are defined -> what people call them: `torch.nn.modules.linear.Linear` -> `torch.nn.Linear`.

    Read from the imported namespaces, shortest public name first.
    """
    names: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(namespaces, key=lambda n: (n.count("."), n)):
            for attribute, value in _public_items(name):
                if callable(value) and not isinstance(value, ModuleType):
                    home = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
                    names.setdefault(home, f"{name}.{attribute}")
    return names


def _definitions(body: Sequence[ast.stmt], prefix: str, group: str) -> Iterator[Document]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):  # definitions behind `if sys.version_info` or `try: import`
            yield from _definitions(node.body, prefix, group)
        if not isinstance(node, Definition):
            continue
        name = f"{prefix}.{node.name}"
        text = clean_docstring(split_signature(name, ast.get_docstring(node) or "")[1])
        if text:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield Document(name, kind, name + signature_of(node), text, group)
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, name, group)


def _parameters(arguments: ast.arguments, *, bound: bool) -> str:
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    for defaults in (arguments.defaults, arguments.kw_defaults):
        for place, default in enumerate(defaults):
            if default is not None and len(ast.unparse(default)) > 24:
                defaults[place] = ast.Constant(...)
    if bound:
        holder = arguments.posonlyargs or arguments.args
        if holder:
            total = len(arguments.posonlyargs) + len(arguments.args)
            if len(arguments.defaults) == total:
                arguments.defaults.pop(0)
            holder.pop(0)
    return f"({ast.unparse(arguments)})"


def _public_items(name: str) -> list[tuple[str, Any]]:
    try:
        module = import_module(name)
    except ImportError:
        return []
    items = {a: v for a, v in vars(module).items() if not a.startswith("_")}
    return [(a, items[a]) for a in sorted(items)]


def _namespace(name: str) -> Iterator[Document]:
    items = _public_items(name)
    if items and not _has_source(module := import_module(name)):
        body = clean_docstring(inspect.getdoc(module) or "")
        if body:
            yield Document(name, "module", name, body, top_submodule(name))
    prefix = "" if name == "builtins" else f"{name}."
    for attribute, value in items:
        yield from _compiled(f"{prefix}{attribute}", value, name)


def _compiled(name: str, value: Any, module: str) -> Iterator[Document]:
    if not callable(value):
        return
    if not isinstance(value, type):
        yield from _documented(name, value, "function", module)
        return
    yield from _documented(name, value, "class", module)
    for base in value.__mro__:  # torch.Tensor is Python, its methods come from a C base
        if _has_source(base) or (base is not value and base.__module__ == "builtins"):
            continue
        for attribute, member in sorted(vars(base).items()):
            if not attribute.startswith("_") and callable(member) and not _has_source(member):
                yield from _documented(f"{name}.{attribute}", member, "function", module)


def _documented(name: str, value: Any, kind: str, module: str) -> Iterator[Document]:
    text = vars(value).get("__doc__") if isinstance(value, type) else inspect.getdoc(value)
    if not isinstance(text, str):
        return
    signature, text = split_signature(name, inspect.cleandoc(text))
    if signature is None:
        signature = _run_time_signature(value)
    body = clean_docstring(text)
    if body:
        yield Document(name, kind, name + signature, body, top_submodule(module))


def _run_time_signature(value: Any) -> str:
    """`(key, default=None, /)` of an imported object, without annotations and `self`; "" where it does not tell."""
    try:
        found = inspect.signature(value)
    except (ValueError, TypeError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    text = re.sub(r"\((?:\$?self|type)(?:, /)?(?:, )?", "(", text)
    return text if len(text) <= LONGEST_SIGNATURE and "<" not in text else ""


def split_signature(name: str, text: str) -> tuple[str | None, str]:
    """Many docstrings begin with the signature, `zeros(shape) -> Tensor`: it and the rest, or None and all."""
    short = name.rsplit(".", 1)[-1]
    for opening in (f"{short}(", f"{name}("):
        if text.startswith(opening):
            depth = 0
            for place, character in enumerate(text):
                depth += (character in "([{") - (character in ")]}")
                if character == ")" and depth == 0:
                    line_end = text.find("\n", place)
                    line_end = len(text) if line_end < 0 else line_end
                    result = text[place + 1 : line_end].strip()
                    if result and not result.startswith("->"):
                        return None, text  # a sentence that begins with a call
                    signature = " ".join(text[len(opening) - 1 : place + 1].split())
                    return f"{signature} {result}".strip(), text[line_end:].lstrip("\n")
    return None, text


def _has_source(value: Any) -> bool:
    """Whether the ast walk has seen it: a Python function, or a class made by a `class` statement."""
    if isinstance(value, ModuleType):
        return str(getattr(value, "__file__", None) or "").endswith(".py")
    if isinstance(value, type):
        return "__dict__" in vars(value) or "__weakref__" in vars(value) or _is_in_source(value)
    return inspect.isfunction(inspect.unwrap(value))


def _is_in_source(value: type) -> bool:
    return any(inspect.isfunction(member) for member in vars(value).values())
