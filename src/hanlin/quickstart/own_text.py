"""`--text PATH ...`: the user's own files as documents, in place of the default corpus.

    .md          a document a heading            .py                a document a docstring, as in the default corpus
    .txt ...     a document a few paragraphs     .jsonl, .parquet   the same within each row

Titles become what questions are about: the heading, or the first words of a passage.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hanlin.core.errors import HanlinError
from hanlin.core.files import file_hash
from hanlin.core.text_sources import find_files, kind, read_documents
from hanlin.quickstart.clean import clean_text, paragraphs
from hanlin.quickstart.corpus import deduplicate
from hanlin.quickstart.walk import Document, SourceFile, read_file

PASSAGE_LENGTH = 1200  # characters that a passage of plain text grows to before the next begins
TITLE_LENGTH = 60
FEW_FILES = 12  # up to so many files, passages rather than whole files are held out

_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def own_files(paths: Sequence[Path]) -> list[Path]:
    """The text and Python files below `paths`, each once. A path that is not there, or holds nothing, is an error."""
    found: list[Path] = []
    for path in paths:
        code = sorted(path.rglob("*.py")) if path.is_dir() else []
        try:
            found += find_files([path])
        except HanlinError:
            if not code:
                raise
        found += code
    return list(dict.fromkeys(found))


def own_fingerprint(files: Iterable[Path]) -> dict[str, str]:
    """Content hash of each file: a changed word makes everything after it anew."""
    return {str(path): file_hash(path) for path in files}


def own_documents(files: Sequence[Path]) -> list[Document]:
    """Documents of the files, deduplicated. The group (what the split keeps together) is the file, or, where there
    are few files, the passage."""
    code = [path for path in files if kind(path) == ".py"]
    documents = [document for path in code for document in read_file(SourceFile(path, path.stem))]
    prose = [path for path in files if kind(path) != ".py"]
    for text in read_documents(prose) if prose else ():
        documents.extend(_sections(text.text, text.name))
    if len(files) <= FEW_FILES:
        documents = [Document(d.name, d.kind, d.head, d.body, f"{d.group}: {d.name}") for d in documents]
    documents = deduplicate(documents)
    if not documents:
        names = ", ".join(map(str, files[:5]))
        raise HanlinError(f"There is no text to learn from in {names}: nothing but symbols and a few short lines.")
    return documents


def _sections(text: str, name: str) -> Iterator[Document]:
    pieces = _HEADING.split(text) if kind(Path(name)) in (".md", ".markdown") else [text]
    yield from _passages(pieces[0], name)
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        yield from _passages(body, name, title)


def _passages(text: str, group: str, title: str | None = None) -> Iterator[Document]:
    """Paragraphs gathered to passages of about `PASSAGE_LENGTH` characters."""
    gathered: list[str] = []
    for block in [*paragraphs(clean_text(text)), ""]:
        if gathered and (not block or sum(map(len, gathered)) + len(block) > PASSAGE_LENGTH):
            body = "\n\n".join(gathered)
            name = title or title_of(body)
            yield Document(name, "passage", name, body, group)
            gathered, title = [], None
        gathered += [block] if block else []


def title_of(text: str) -> str:
    """What a passage is called that has no heading: its first words (Chinese: its first clause)."""
    first = " ".join(text.split("\n", 1)[0].split())
    if len(first) > TITLE_LENGTH:
        first = re.split(r"[，。！？；：,;:.!?](?=\s|$|[\u4e00-\u9fff“”])", first, maxsplit=1)[0]
    if len(first) > TITLE_LENGTH:
        first = first[:TITLE_LENGTH].rsplit(" ", 1)[0]
    return first.strip("，。：:,. ") or text[:TITLE_LENGTH]
