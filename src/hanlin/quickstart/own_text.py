"""`--text PATH ...`: the user's own files as documents, in place of the default corpus.

    .md .rst        a document a heading           .py             a document a docstring, as in the default corpus
    .txt and other  a document a few paragraphs    .jsonl          a document a row (`text`, or the turns of a chat)

A folder is searched for files with these endings. Titles become what questions are about: the heading, or the first
words of a passage.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hanlin.core.errors import HanlinError
from hanlin.core.files import file_hash
from hanlin.quickstart.clean import clean_text, paragraphs
from hanlin.quickstart.corpus import deduplicate
from hanlin.quickstart.walk import Document, SourceFile, read_file

ENDINGS = (".txt", ".md", ".markdown", ".rst", ".py", ".jsonl")
PASSAGE_LENGTH = 1200  # characters that a passage of plain text grows to before the next begins
TITLE_LENGTH = 60
FEW_FILES = 12  # up to so many files, passages rather than whole files are held out

_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def own_files(paths: Sequence[Path]) -> list[Path]:
    """The readable files below `paths`, sorted, each once. A path that is not there, or holds nothing, is an error."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix.lower() in ENDINGS]
            if not inside:
                raise HanlinError(f"--text {path}: the folder holds no file that ends in {', '.join(ENDINGS)}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise HanlinError(f"--text {path} does not exist. Give text files, or folders of them.")
    return list(dict.fromkeys(found))


def own_fingerprint(files: Iterable[Path]) -> dict[str, str]:
    """Content hash of each file: a changed word makes everything after it anew."""
    return {str(path): file_hash(path) for path in files}


def own_documents(files: Sequence[Path]) -> list[Document]:
    """Documents of the files, deduplicated. The group (what the split keeps together) is the file, or, where there
    are few files, the passage."""
    documents: list[Document] = []
    for path in files:
        documents.extend(_documents(path))
    if len(files) <= FEW_FILES:
        documents = [Document(d.name, d.kind, d.head, d.body, f"{d.group}: {d.name}") for d in documents]
    documents = deduplicate(documents)
    if not documents:
        names = ", ".join(map(str, files[:5]))
        raise HanlinError(f"There is no text to learn from in {names}: empty, or nothing but symbols and short lines.")
    return documents


def _documents(path: Path) -> Iterator[Document]:
    if path.suffix.lower() == ".py":
        yield from read_file(SourceFile(path, path.stem))
        return
    text = read_utf8(path)
    if path.suffix.lower() == ".jsonl":
        for number, row in enumerate(text.splitlines(), start=1):
            if row.strip():
                yield from _passages(_row_text(row, path, number), path)
        return
    marked = path.suffix.lower() in (".md", ".markdown", ".rst")
    pieces = _HEADING.split(text) if marked else [text]
    yield from _passages(pieces[0], path)
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        yield from _passages(body, path, title)


def read_utf8(path: Path) -> str:
    """The file's text; bytes that are not UTF-8 are a `HanlinError` with their place."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise HanlinError(
            f"{path} is not UTF-8: byte {error.start} (line {line}) is 0x{data[error.start]:02x}. "
            f"Convert it first, for example: iconv -f GB18030 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from error


def _passages(text: str, path: Path, title: str | None = None) -> Iterator[Document]:
    """Paragraphs gathered to passages of about `PASSAGE_LENGTH` characters."""
    gathered: list[str] = []
    for block in [*paragraphs(clean_text(text)), ""]:
        if gathered and (not block or sum(map(len, gathered)) + len(block) > PASSAGE_LENGTH):
            body = "\n\n".join(gathered)
            name = title or title_of(body)
            yield Document(name, "passage", name, body, str(path))
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


def _row_text(row: str, path: Path, number: int) -> str:
    try:
        value = json.loads(row)
    except json.JSONDecodeError as error:
        raise HanlinError(f"{path}, line {number} is not valid JSON: {error.msg}.") from error
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            return value["text"]
        turns = value.get("messages")
        if isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns):
            return "\n\n".join(turn["content"] for turn in turns)
    raise HanlinError(f'{path}, line {number}: expected a JSON object with "text" or "messages", found {row[:60]!r}.')
