"""The default corpus: documentation that every machine able to run Hanlin already holds. Nothing is downloaded.

    standard library + core dependencies  --walk-->  documents  --clean, deduplicate-->  --split by module-->
    train.jsonl, heldout.jsonl

Only the standard library and the packages that Hanlin itself depends on are read, so an environment with development
packages gives the same text as a bare one. Held-out modules are chosen by hash among those that no listed fact lives
in; a held-out paragraph that also stands in the training text is removed (`forget_shared_paragraphs`).
"""

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path
from hanlin.core.progress import Progress
from hanlin.quickstart.clean import clean_text, normalised, paragraphs
from hanlin.quickstart.facts import NAMES
from hanlin.quickstart.walk import Document, SourceFile, compiled_documents, public_names, read_file

# import name -> distribution name, in order of precedence where two packages say the same
PACKAGES = {
    "numpy": "numpy",
    "torch": "torch",
    "matplotlib": "matplotlib",
    "pydantic": "pydantic",
    "rich": "rich",
    "jinja2": "jinja2",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "tyro": "tyro",
    "PIL": "pillow",
    "networkx": "networkx",
    "sympy": "sympy",
    "mpmath": "mpmath",
    "fsspec": "fsspec",
    "filelock": "filelock",
    "pygments": "pygments",
    "packaging": "packaging",
    "dateutil": "python-dateutil",
    "tqdm": "tqdm",
}
NOT_PROSE = frozenset(
    {"test", "idlelib", "lib2to3", "turtledemo", "antigravity", "this", "__phello__", "ensurepip", "ntpath"}
)
SPECIALIST = frozenset({"sympy.physics", "sympy.polys", "numpy.distutils", "numpy.f2py", "torch.ao", "pygments.lexers"})
SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "site-packages", "__pycache__", "idle_test"})
NAMESPACES = (
    *("builtins", "math", "cmath", "time", "itertools", "functools", "operator", "random", "json", "os", "os.path"),
    *("sys", "re", "string", "collections", "datetime", "pathlib", "statistics", "decimal", "fractions", "io", "csv"),
    *("copy", "glob", "shutil", "subprocess", "threading", "asyncio", "typing", "dataclasses", "contextlib", "pickle"),
    *("hashlib", "base64", "struct", "zlib", "gzip", "heapq", "bisect", "textwrap", "logging", "argparse", "sqlite3"),
    *("array", "select", "socket", "signal", "gc", "binascii", "unicodedata", "codecs", "inspect", "enum", "queue"),
    *("urllib.parse", "urllib.request", "concurrent.futures", "multiprocessing", "tempfile", "uuid", "types"),
    *("numpy", "numpy.linalg", "numpy.random", "numpy.fft", "numpy.ma", "numpy.char", "numpy.polynomial"),
    *("torch", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.utils", "torch.optim", "torch.autograd"),
    *(
        "torch.optim.lr_scheduler",
        "torch.utils.data",
        "torch.linalg",
        "torch.fft",
        "torch.special",
        "torch.distributed",
    ),
    *("torch.distributions", "torch.cuda", "torch.sparse", "torch.random"),
)
HELD_OUT_SHARE = 0.04  # of the bytes
LARGEST_HELD_OUT = 0.015  # a module with a larger share of the text is always trained on
SHARED = 48  # normalised characters from which on a paragraph counts as shared between train and held-out


def corpus_fingerprint() -> dict[str, str]:
    """What decides the default corpus: Python, the packages read, and the code that reads them."""
    found = {"python": sys.version.split()[0], "code": code_fingerprint("walk", "clean", "corpus", "facts")}
    for distribution in PACKAGES.values():
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "absent"
    return found


def code_fingerprint(*names: str) -> str:
    """Hash of modules of this package: when their code changes, what they made is made again."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def collect_documents(*, workers: int | None = None, quiet: bool = False) -> list[Document]:
    """Walk everything in parallel; documents in a fixed order, deduplicated, under their public names."""
    files = list(standard_library_files())
    for package in PACKAGES:
        files.extend(package_files(package))
    sizes = [file.path.stat().st_size for file in files]
    documents: list[Document] = []
    with (
        Progress("read documentation", total=sum(sizes) / 1e6, unit="MB", quiet=quiet) as bar,
        ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool,
    ):
        for size, found in zip(sizes, pool.map(read_file, files, chunksize=48), strict=True):
            documents.extend(found)
            bar.advance(size / 1e6)
    documents = [d for d in rename(documents, public_names(NAMESPACES)) if not is_internal(d.name)]
    documents += [*compiled_documents(NAMESPACES), *topic_documents()]
    return deduplicate(sorted(documents, key=lambda d: d.name not in NAMES))  # str.replace before bytes.replace


def standard_library_files() -> Iterator[SourceFile]:
    """Source files of the standard library, sorted, without its tests."""
    for name in sorted(sys.stdlib_module_names - NOT_PROSE):
        yield from package_files(name)


def package_files(name: str) -> Iterator[SourceFile]:
    """Source files of one top-level module or package, sorted, without tests and vendored copies."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    if not spec.submodule_search_locations:
        if spec.origin and spec.origin.endswith(".py"):
            yield SourceFile(Path(spec.origin), name)
        return
    for location in spec.submodule_search_locations:
        root = Path(location)
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            if not SKIPPED_FOLDERS & set(parts):
                yield SourceFile(path, ".".join(parts).removesuffix(".__init__"))


def topic_documents() -> list[Document]:
    """The language reference that `help("for")` reads: `pydoc_data.topics`."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    found = []
    for name, text in sorted(topics.items()):
        body = clean_text(re.sub(r"\n\*{3,}\n", "\n", text))
        if body:
            found.append(Document(f"python.{name}", "topic", f"Python: {name}", body, "pydoc_data"))
    return found


def rename(documents: Iterable[Document], public: dict[str, str]) -> list[Document]:
    """Documents under the names that people use; methods follow their class."""
    renamed = []
    for document in documents:
        name = document.name
        best = public.get(name)
        if best is None and "." in name:
            owner, _, method = name.rpartition(".")
            best = f"{public[owner]}.{method}" if owner in public else None
        if best is None:
            best = name.replace("posixpath.", "os.path.")
        renamed.append(
            Document(best, document.kind, best + document.head.removeprefix(name), document.body, document.group)
        )
    return renamed


def is_internal(name: str) -> bool:
    """Private modules of packages (`torch._inductor`, `pydantic._internal`) and what no newcomer asks about."""
    parts = name.split(".")
    private = any(part.startswith("_") and not part.startswith("__") for part in parts[1:3])
    return parts[0] in PACKAGES and (private or ".".join(parts[:2]) in SPECIALIST)


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """The first of each name, and the first of each body up to case, digits, blanks and punctuation.

    A short body ("Return a copy.") counts as the same only under the same last name.
    """
    names: set[str] = set()
    bodies: set[bytes] = set()
    kept = []
    for document in documents:
        if document.name in names or re.match(r"torch\.(?:\w+Tensor|\w+Storage)\b", document.name):
            continue
        body = normalised(document.body)
        if len(body) < 80:
            body = f"{document.name.rpartition('.')[2]} {body}"
        key = hashlib.blake2b(body.encode(), digest_size=12).digest()
        if key not in bodies:
            bodies.add(key)
            names.add(document.name)
            kept.append(document)
    return kept


def split_documents(
    documents: Sequence[Document], *, kept: Iterable[str] = (), share: float = HELD_OUT_SHARE
) -> tuple[list[Document], list[Document]]:
    """(train, held-out): whole groups, in the order of their hash, until `share` of the bytes is held out.

    kept: names that must be trained on; their groups stay. A group above `LARGEST_HELD_OUT` of the bytes stays too,
    unless nothing smaller is there.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.text.encode())
    total = sum(sizes.values())
    wanted = set(kept)
    fixed = {document.group for document in documents if document.name in wanted}
    order = sorted(sizes.keys() - fixed, key=lambda g: hashlib.sha256(g.encode()).digest())
    small = [group for group in order if sizes[group] <= max(LARGEST_HELD_OUT, share / 2) * total]
    held: set[str] = set()
    taken = 0
    for group in small or order[:1]:
        if taken >= share * total or len(held) == len(sizes) - 1:
            break
        held.add(group)
        taken += sizes[group]
    train = [document for document in documents if document.group not in held]
    return train, forget_shared_paragraphs([d for d in documents if d.group in held], train)


def forget_shared_paragraphs(held_out: Sequence[Document], train: Sequence[Document]) -> list[Document]:
    """Held-out documents without the paragraphs that the training text holds too (boilerplate, copies)."""
    seen = {key for document in train for key in _paragraph_keys(document.body)}
    kept = []
    for document in held_out:
        blocks = [b for b in paragraphs(document.body) if not (set(_paragraph_keys(b)) & seen)]
        body = clean_text("\n\n".join(blocks))
        if body:
            kept.append(Document(document.name, document.kind, document.head, body, document.group))
    return kept


def write_documents(documents: Iterable[Document], path: Path) -> int:
    """One JSON object a line, atomically; returns the bytes of text."""
    size = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps(document.row(), ensure_ascii=False) + "\n")
            size += len(document.text.encode())
    return size


def read_documents(path: Path) -> list[Document]:
    """What `write_documents` wrote."""
    with path.open(encoding="utf-8") as stream:
        return [Document.from_row(json.loads(line)) for line in stream]


def build_corpus(
    folder: Path, documents: Sequence[Document], *, kept: Iterable[str] = (), share: float = HELD_OUT_SHARE
) -> dict[str, int]:
    """Split and write `train.jsonl` and `heldout.jsonl`; returns documents and bytes of each."""
    train, held_out = split_documents(documents, kept=kept, share=share)
    if not train or not held_out:
        raise HanlinError(
            f"The text gives {len(train)} documents to train on and {len(held_out)} to hold out; both need at least "
            "one. Give more text: several files, or one file with headings or empty lines between its parts."
        )
    return {
        "train_documents": len(train),
        "train_bytes": write_documents(train, folder / "train.jsonl"),
        "heldout_documents": len(held_out),
        "heldout_bytes": write_documents(held_out, folder / "heldout.jsonl"),
    }


def _paragraph_keys(text: str) -> Iterator[bytes]:
    for block in paragraphs(text):
        key = normalised(block)
        if len(key) >= SHARED:
            yield hashlib.blake2b(key.encode(), digest_size=12).digest()
