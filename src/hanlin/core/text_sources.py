"""Documents from the files people have: plain text, jsonl, json, parquet; each but parquet also as .gz or .zst.

    a text file      one document; with a separator ("\\n", "<|endoftext|>") one document a piece
    jsonl, json,     one document a row: the field `text`, or all that is said in `messages`, `conversations`, or
    parquet          Alpaca's instruction, input and output
    a folder         its text files in the order of their names, subfolders included

Files are streamed: a corpus may be larger than memory. Text is UTF-8, kept character for character (line ends too; only
a byte order mark is dropped). Bytes that are not UTF-8 are refused with the file and their offset.
"""

import codecs
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError, require

PACKED = (".gz", ".zst", ".zstd")
ROWS = (".jsonl", ".ndjson", ".json", ".parquet")
IN_FOLDERS = (".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson", ".parquet")  # .json is too often something else
CONVERSATION = ("messages", "conversations", "instruction", "input", "output")
CHUNK = 1 << 20  # bytes of a file read at once; characters of a text given at once

Advance = Callable[[int], None]  # told how many bytes of the file on disk were read


@dataclass(frozen=True)
class Document:
    """name: the file, and the row or piece in it (`news.jsonl:17`, from 1): an error can say which text it was."""

    name: str
    text: str


def find_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files of `paths`, folders walked in the order of their names; hidden files and folders are left out.

    A file that is named is taken whatever its suffix; in folders those of `IN_FOLDERS` are taken.
    """
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            inside = [
                file
                for file in sorted(given.rglob("*"))
                if file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(given).parts)
                and kind(file) in IN_FOLDERS
            ]
            if not inside:
                raise HanlinError(
                    f"The folder {given} holds no text: looked for {', '.join(IN_FOLDERS)} (also with "
                    f"{' or '.join(PACKED[:2])}). Name other files one by one."
                )
            found.extend(inside)
        elif given.exists():
            found.append(given)
        else:
            raise HanlinError(f"{given} does not exist. Give text files, or folders with text files.")
    if not found:
        raise HanlinError("No files were given. Give text files, or folders with text files.")
    return found


def kind(file: Path) -> str:
    """The suffix that says what a file holds: `.jsonl` for `a.JSONL.gz`."""
    name = file.name.lower()
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def size_on_disk(files: Iterable[Path]) -> int:
    """Bytes of the files as they lie there: what `advance` adds up to."""
    return sum(file.stat().st_size for file in files)


def read_documents(
    paths: Iterable[str | os.PathLike[str]],
    *,
    field: str = "text",
    separator: str | None = None,
    advance: Advance | None = None,
) -> Iterator[Document]:
    """All documents of `paths`, in order; those of white space alone are left out.

    field: where the text stands in a row. separator: what stands between two documents of a plain text file (None: a
    file is one document). Raises `HanlinError` for a missing file, text that is not UTF-8 (file and byte), a broken
    archive, a row without text (file and row), and a corpus without any text.
    """
    files = find_files(paths)
    empty = True
    for file in files:
        for document in _documents(file, field, separator, advance or (lambda count: None)):
            if not document.text.isspace() and document.text:
                empty = False
                yield document
    if empty:
        shown = ", ".join(map(str, files[:3])) + (" …" if len(files) > 3 else "")
        raise HanlinError(f"There is no text in {shown}: the corpus is empty. Give files with text.")


def read_texts(
    paths: Iterable[str | os.PathLike[str]], *, field: str = "text", advance: Advance | None = None
) -> Iterator[str]:
    """The same text without borders, for counting: a long text file comes in pieces that end with a line."""
    for file in find_files(paths):
        if kind(file) in ROWS:
            for document in _documents(file, field, None, advance or (lambda count: None)):
                yield document.text
        else:
            rest = ""
            for piece in decoded(file, advance):
                cut = piece.rfind("\n") + 1
                yield rest + piece[:cut]
                rest = piece[cut:]
                if len(rest) > CHUNK:
                    yield rest
                    rest = ""
            yield rest


def record_text(record: Any, field: str, place: str) -> str:
    """The text of one row; `place` (file and row) is for the error."""
    if not isinstance(record, Mapping):
        raise HanlinError(f"{place} is a JSON {_json_name(record)}; expected an object with a field {field!r}.")
    if field in record:
        if not isinstance(record[field], str):
            raise HanlinError(f"{place}: the field {field!r} is a {_json_name(record[field])}; expected text.")
        return record[field]
    if field == "text":
        for turns, words in (("messages", "content"), ("conversations", "value")):
            if isinstance(record.get(turns), list):
                said = [turn.get(words) for turn in record[turns] if isinstance(turn, Mapping)]
                return "\n".join(text for text in said if isinstance(text, str))
        if isinstance(record.get("instruction"), str):
            parts = [record["instruction"], record.get("input"), record.get("output")]
            return "\n".join(part for part in parts if isinstance(part, str) and part)
    raise HanlinError(
        f"{place} has no field {field!r}; its fields are {', '.join(map(repr, record)) or 'none'}. Say which field "
        "holds the text; where none is named, `text`, `messages`, `conversations` or `instruction` is expected."
    )


def decoded(file: Path, advance: Advance | None = None) -> Iterator[str]:
    """The text of one file in pieces of about a megabyte, unpacked and decoded."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0  # bytes given to the decoder
    for chunk in _with_end(unpacked(file, advance)):
        held = decoder.getstate()[0]
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, position - len(held) + error.start, held + chunk, error.start) from None
        if position == 0:
            text = text.removeprefix("\ufeff")
        position += len(chunk)
        if text:
            yield text


def unpacked(file: Path, advance: Advance | None = None) -> Iterator[bytes]:
    """The bytes of one file in pieces, unpacked where its name ends in .gz or .zst; a cut-off archive is refused."""
    suffix = file.suffix.lower()
    if file.is_dir():
        raise HanlinError(f"{file} is a folder; expected a file.")
    with file.open("rb") as stream:
        unpack = None
        read = 0
        while chunk := stream.read(CHUNK):
            read += len(chunk)
            if advance is not None:
                advance(len(chunk))
            if suffix not in PACKED:
                yield chunk
                continue
            while chunk:  # one archive may follow another in the same file
                unpack = unpack or _unpacker(suffix)
                try:
                    data = unpack.decompress(chunk)
                except Exception as error:  # zlib and zstandard each have their own
                    raise HanlinError(
                        f"{file} cannot be unpacked near byte {read - len(chunk)}: {error}. Expected a sound {suffix}."
                    ) from error
                chunk = unpack.unused_data if unpack.eof else b""
                unpack = None if unpack.eof else unpack
                if data:
                    yield data
        if unpack is not None:
            raise HanlinError(f"{file} is cut off: the archive ends in the middle, after {read} bytes. Fetch it again.")


def _documents(file: Path, field: str, separator: str | None, advance: Advance) -> Iterator[Document]:
    suffix = kind(file)
    if suffix == ".parquet":
        yield from _parquet(file, field, advance)
    elif suffix == ".json":
        yield from _json(file, field, advance)
    elif suffix in ROWS:
        for number, line in enumerate(_split(decoded(file, advance), "\n"), 1):
            if line.strip():
                place = f"{file}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise HanlinError(f"{place} is not valid JSON: {error}. Expected one object a line.") from error
                yield Document(place, _sound(record_text(record, field, place), place))
    elif separator is None:
        yield Document(str(file), "".join(decoded(file, advance)))
    else:
        for number, text in enumerate(_split(decoded(file, advance), separator), 1):
            yield Document(f"{file}:{number}", text)


def _json(file: Path, field: str, advance: Advance) -> Iterator[Document]:
    try:
        rows = json.loads("".join(decoded(file, advance)))
    except ValueError as error:
        raise HanlinError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(rows, list):
        raise HanlinError(f"{file} is a JSON {_json_name(rows)}; expected a list of objects with a field {field!r}.")
    for number, record in enumerate(rows, 1):
        place = f"{file}:{number}"
        yield Document(place, _sound(record_text(record, field, place), place))


def _parquet(file: Path, field: str, advance: Advance) -> Iterator[Document]:
    require("pyarrow", "parquet")
    parquet = require("pyarrow.parquet", "parquet")
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise HanlinError(f"{file} is not a whole parquet file: {error}.") from error
    with table:
        names = table.schema_arrow.names
        read = [field] if field in names else [name for name in CONVERSATION if name in names]
        columns = read or names  # none of them: the first row is answered with the names that there are
        size, rows, number = file.stat().st_size, max(table.metadata.num_rows, 1), 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                number += 1
                place = f"{file}:{number}"
                yield Document(place, _sound(record_text(record, field, place), place))
            advance(size * number // rows - size * (number - batch.num_rows) // rows)


def _split(pieces: Iterable[str], separator: str) -> Iterator[str]:
    """What stands between the separators of a streamed text; a piece without any is not copied again and again."""
    pending: list[str] = []
    tail = ""  # the separator may lie across two pieces
    for piece in pieces:
        if separator in tail + piece:
            parts = "".join([*pending, piece]).split(separator)
            yield from parts[:-1]
            pending = [parts[-1]]
        else:
            pending.append(piece)
        if len(separator) > 1:
            tail = (tail + piece if len(piece) < len(separator) else piece)[1 - len(separator) :]
    yield "".join(pending)


def _with_end(chunks: Iterable[bytes]) -> Iterator[bytes]:
    yield from chunks
    yield b""


def _unpacker(suffix: str) -> Any:
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _sound(text: str, place: str) -> str:
    """JSON can spell half a character ("\\ud83d"); no encoding of text can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HanlinError(
            f"{place} holds half a character (the lone surrogate U+{ord(text[error.start]):04X}) at character "
            f"{error.start} of its text. It was cut or badly escaped; mend the row or leave it out."
        ) from None
    return text


def _not_utf8(file: Path, offset: int, near: bytes, start: int) -> HanlinError:
    sample = near[start : start + 4096]
    hint = "Convert it to UTF-8 first."
    if near[:2] in (b"\xff\xfe", b"\xfe\xff") and offset <= 1:
        hint = f"It looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {file.name} > new.txt"
    else:
        for cut in range(4):
            try:
                letters = sample[: len(sample) - cut].decode("gb18030")
            except UnicodeDecodeError:
                continue
            if any("\u4e00" <= letter <= "\u9fff" for letter in letters):
                hint = f"It looks like GB18030 (GBK); convert it: iconv -f GB18030 -t UTF-8 {file.name} > new.txt"
            break
    unpacked_file = " of the unpacked text" if file.suffix.lower() in PACKED else ""
    return HanlinError(
        f"{file} is not UTF-8: byte {offset}{unpacked_file} is 0x{near[start]:02x}, which cannot stand there. {hint}"
    )


def _json_name(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "object")
