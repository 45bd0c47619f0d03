"""Where documents come from: files and folders with what is needed to read them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hanlin.core.recipe import Section
from hanlin.core.text_sources import Advance, Document, find_files, read_documents


class TextSource(Section):
    """Files and folders of one kind: txt, jsonl, json, parquet, each but parquet also as .gz or .zst."""

    paths: Annotated[list[Path], Field(min_length=1, description="files, and folders that are searched for text")]
    field: Annotated[str, Field(description="where the text of a row stands (jsonl, json, parquet)")] = "text"
    separator: Annotated[
        str | None, Field(min_length=1, description="between documents of a plain text file; None: a file is one")
    ] = None

    def describe(self) -> dict[str, Any]:
        """JSON by which another content is noticed: every file with its size and time of change."""
        files = find_files(self.paths)
        stats = [file.stat() for file in files]
        return {
            "files": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)],
            "field": self.field,
            "separator": self.separator,
        }


def read_sources(sources: Sequence[TextSource], *, advance: Advance | None = None) -> Iterator[Document]:
    """The documents of all sources, one after the other (`read_documents` says what is refused)."""
    for source in sources:
        yield from read_documents(source.paths, field=source.field, separator=source.separator, advance=advance)
