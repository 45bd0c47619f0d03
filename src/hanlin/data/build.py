"""Documents -> token shards, resumable shard by shard.

    documents ─→ tokenise (all cores, in order) ─→ shard-00000, shard-00001, … ─→ manifest.json

A shard ends with the document that fills it (`shard_bytes` of text), so where shards end depends on the text alone. A
build that was killed is run again: finished shards are kept if the documents they hold come again unchanged (their
hash), which costs reading but no tokenising; the first that differs and all after it are made anew. The result is the
same, byte for byte, as that of a build that was never disturbed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, sweep_partial, write_json
from hanlin.core.progress import Progress, say
from hanlin.core.text_sources import Document, find_files, size_on_disk
from hanlin.data.recipe import DataRecipe
from hanlin.data.shards import FORMAT, ShardRecord, TokenShards, token_dtype, write_shard
from hanlin.data.sources import read_sources
from hanlin.data.tokenise import Tokenised, tokenise
from hanlin.tokens import Tokenizer

SMALL = 4e6  # bytes of text on disk that are tokenised before a second process has started
SHARD_BYTES = 64_000_000


def build(recipe: DataRecipe, *, quiet: bool = False) -> TokenShards:
    """Token shards as the recipe says; a folder that is already complete for it is only opened."""
    tokenizer = Tokenizer.load(recipe.tokenizer)
    size = size_on_disk(find_files(path for source in recipe.sources for path in source.paths))
    workers = recipe.workers or (1 if size <= SMALL else os.cpu_count() or 1)
    with Progress("tokenise", total=size / 1e6, unit="MB", quiet=quiet) as bar:
        return build_shards(
            read_sources(recipe.sources, advance=lambda count: bar.advance(count / 1e6)),
            tokenizer,
            recipe.out,
            source=[source.describe() for source in recipe.sources],
            shard_bytes=int(recipe.shard_mb * 1e6),
            workers=workers,
            overwrite=recipe.overwrite,
            quiet=quiet,
        )


def build_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    source: Any = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    quiet: bool = True,
) -> TokenShards:
    """Tokenise documents into the folder `out`, or go on where an earlier build of the same was interrupted.

    documents: in an order that does not change from run to run. source: JSON that says where they come from; a folder
    that was built from another source, or otherwise, is refused unless `overwrite`. Documents without any text are left
    out. Raises `HanlinError` for documents that hold no text at all.
    """
    folder = Path(out)
    plan: dict[str, Any] = {
        "format": FORMAT,
        "source": json.loads(json.dumps(source)),  # as it will be read back: tuples are lists
        "shard_bytes": shard_bytes,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "size": tokenizer.size, "eos_id": tokenizer.eos_id},
    }
    _begin(folder, plan, overwrite)
    if (folder / "manifest.json").exists():
        return TokenShards(folder, tokenizer)
    tokenizer.save(folder / "tokenizer")
    records, rest = _finished(folder, (document for document in documents if document.text), quiet)
    dtype = token_dtype(tokenizer.size)
    eos = np.array([tokenizer.eos_id], dtype=np.uint32)
    for group in _groups(tokenise(rest, tokenizer, workers=workers), shard_bytes):
        digest = _Digest()
        for document, _ in group:
            digest.add(document)
        record = write_shard(
            folder,
            f"shard-{len(records):05}",
            tokens=[np.concatenate([tokens, eos]) for _, tokens in group],
            names=[document.name for document, _ in group],
            dtype=dtype,
            text_bytes=digest.text_bytes,
            text_sha256=digest.hexdigest(),
        )
        records.append(record)
    if not records:
        raise HanlinError(f"There is no text to write to {folder}: the corpus is empty. Give documents with text.")
    write_json(folder / "manifest.json", _manifest(plan, records, dtype))
    return TokenShards(folder, tokenizer)


def _begin(folder: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Make the folder ready for this plan: new, to be continued, complete, or refused."""
    if folder.exists() and not folder.is_dir():
        raise HanlinError(f"{folder} is a file; token shards need a folder. Choose another name.")
    if overwrite and (folder / "build.json").exists():
        shutil.rmtree(folder)
    if (folder / "build.json").exists():
        sweep_partial(folder)
        before = read_json(folder / "build.json")
        differing = [key for key in plan if before.get(key) != plan[key]]
        if differing:
            raise HanlinError(
                f"{folder} holds token shards that were made otherwise (other {', '.join(differing)}). Give another "
                "`out`, or replace them with `--overwrite true`."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise HanlinError(f"{folder} is not empty and holds no token shards. Give an empty or a new folder as `out`.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "build.json", plan)


def _finished(folder: Path, documents: Iterator[Document], quiet: bool) -> tuple[list[ShardRecord], Iterable[Document]]:
    """Shards that an earlier build finished, and the documents that are still to do."""
    records: list[ShardRecord] = []
    held: list[Document] = []
    while (folder / f"shard-{len(records):05}" / "shard.json").exists():
        record = ShardRecord.read(read_json(folder / f"shard-{len(records):05}" / "shard.json"))
        digest, held = _Digest(), []
        for document in documents:
            digest.add(document)
            held.append(document)
            if len(held) == record.documents:
                break
        if digest.hexdigest() != record.text_sha256:
            break
        records.append(record)
        held = []
    stale = sorted(folder.glob("shard-*"))[len(records) :]
    for old in stale:
        shutil.rmtree(old)
    if records:
        say(f"{len(records)} finished shards are kept.", quiet=quiet)
    return records, chain(held, documents)


def _groups(documents: Iterable[Tokenised], shard_bytes: int) -> Iterator[list[Tokenised]]:
    """Documents of one shard each: the one that reaches `shard_bytes` is the last of its shard."""
    group: list[Tokenised] = []
    size = 0
    for document, tokens in documents:
        group.append((document, tokens))
        size += len(document.text.encode())
        if size >= shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Digest:
    """Hash of documents, names and texts, each with its length, so that no border can move unseen."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.text_bytes = 0

    def add(self, document: Document) -> None:
        name, text = document.name.encode(), document.text.encode()
        self._hash.update(f"{len(name)} {len(text)} ".encode() + name)
        self._hash.update(text)
        self.text_bytes += len(text)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _manifest(plan: dict[str, Any], records: list[ShardRecord], dtype: np.dtype) -> dict[str, Any]:
    return {
        **plan,
        "dtype": dtype.name,
        "documents": sum(record.documents for record in records),
        "tokens": sum(record.tokens for record in records),
        "text_bytes": sum(record.text_bytes for record in records),
        "shards": [asdict(record) for record in records],
    }
