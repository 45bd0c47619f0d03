"""Token shards: documents as tokens on disk, read through memory maps.

    DATA/manifest.json        written last: a folder with it is complete
    DATA/tokenizer/           the tokenizer that made the tokens
    DATA/shard-00000/
        tokens.npy            uint16 (uint32 above 65,536 ids): all documents, each closed by the end token
        starts.npy            int64 (documents + 1): where each document begins, and the end
        names.npy             uint8: the documents' names, UTF-8, one after the other
        name_ends.npy         int64 (documents): where each name ends
        shard.json            counts and hashes, so that a build can go on after `kill -9`

A shard is a folder that is renamed into place as a whole. The arrays are plain .npy files: NumPy opens them anywhere.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, file_hash, read_json, write_json
from hanlin.tokens import Tokenizer

FORMAT = "hanlin-token-shards-1"
ARRAYS = ("tokens", "starts", "names", "name_ends")


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard. text_bytes: of the UTF-8 originals; text_sha256: of their names and texts.

    files: file name -> [size in bytes, SHA-256].
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int
    text_sha256: str
    files: dict[str, tuple[int, str]]

    @classmethod
    def read(cls, value: dict[str, Any]) -> "ShardRecord":
        """From JSON."""
        files = {name: (size, digest) for name, (size, digest) in value["files"].items()}
        counts = value["documents"], value["tokens"], value["text_bytes"]
        return cls(value["name"], *counts, value["text_sha256"], files)


@dataclass(frozen=True)
class Shard:
    """One shard's arrays, memory-mapped."""

    tokens: np.ndarray
    starts: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray

    def name(self, document: int) -> str:
        """The name of a document of this shard."""
        start = int(self.name_ends[document - 1]) if document else 0
        return bytes(self.names[start : int(self.name_ends[document])]).decode()


def token_dtype(size: int) -> np.dtype:
    """The smallest type that holds `size` different ids."""
    return np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)


def write_shard(
    data: Path,
    name: str,
    *,
    tokens: Sequence[np.ndarray],
    names: Sequence[str],
    dtype: np.dtype,
    text_bytes: int,
    text_sha256: str,
) -> ShardRecord:
    """Write one shard, whole or not at all. tokens: one array a document, its end token included."""
    spelled = [name.encode() for name in names]
    with atomic_folder(data / name) as folder:
        arrays = {
            "tokens": np.concatenate(tokens).astype(dtype),
            "starts": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
            "names": np.frombuffer(b"".join(spelled), dtype=np.uint8),
            "name_ends": np.cumsum([*map(len, spelled)], dtype=np.int64),
        }
        files = {}
        for title, array in arrays.items():
            file = folder / f"{title}.npy"
            np.save(file, array, allow_pickle=False)
            files[file.name] = (file.stat().st_size, file_hash(file))
        record = ShardRecord(name, len(tokens), len(arrays["tokens"]), text_bytes, text_sha256, files)
        write_json(folder / "shard.json", asdict(record))
    return record


class TokenShards:
    """A folder of shards, opened for reading.

    Opening compares every file's size with the manifest (a truncated shard is refused by name); `verify` compares the
    hashes too. tokenizer: the one that the reader uses; shards of another one are refused.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)
        self.records = [ShardRecord.read(value) for value in self.manifest["shards"]]
        self.shards = [self._open(record) for record in self.records]

    @property
    def tokens(self) -> int:
        """Tokens of all documents, end tokens included."""
        return self.manifest["tokens"]

    @property
    def documents(self) -> int:
        return self.manifest["documents"]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents' text: the denominator of bits per byte."""
        return self.manifest["text_bytes"]

    @property
    def eos_id(self) -> int:
        return self.manifest["tokenizer"]["eos_id"]

    def verify(self) -> None:
        """Read everything and compare the hashes; `HanlinError` names the first file that differs."""
        for record in self.records:
            for name, (_, digest) in record.files.items():
                file = self.path / record.name / name
                if file_hash(file) != digest:
                    raise HanlinError(
                        f"{file} is damaged: its content is not what was written (SHA-256 differs). Delete {self.path} "
                        "and build it again."
                    )

    def _open(self, record: ShardRecord) -> Shard:
        folder = self.path / record.name
        for name, (size, _) in record.files.items():
            file = folder / name
            found = file.stat().st_size if file.exists() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes"
                raise HanlinError(
                    f"{file} {what}; {self.path / 'manifest.json'} says {size:,} bytes. The copy was cut off or the "
                    f"file damaged. Copy it again, or delete {self.path} and build it again."
                )
        return Shard(*(_mapped(folder / f"{title}.npy") for title in ARRAYS))

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        made = self.manifest["tokenizer"]
        if made["fingerprint"] != tokenizer.fingerprint:
            raise HanlinError(
                f"The tokens in {self.path} were made with another tokenizer: {made['size']:,} tokens, fingerprint "
                f"{made['fingerprint'][:12]}; the one in use has {tokenizer.size:,} and {tokenizer.fingerprint[:12]}. "
                f"Use the tokenizer in {self.path / 'tokenizer'}, or build the shards again with the other."
            )
        if made["eos_id"] != tokenizer.eos_id:
            raise HanlinError(
                f"Documents in {self.path} end with token {made['eos_id']}, but the tokenizer in use ends them with "
                f"{tokenizer.eos_id}. Use the tokenizer in {self.path / 'tokenizer'}, or build the shards again."
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a complete folder; anything else is a `HanlinError` that says what to do."""
    file = path / "manifest.json"
    if not file.exists():
        if (path / "build.json").exists():
            raise HanlinError(f"The shards in {path} are not finished. Run the same build again; it continues.")
        raise HanlinError(f"{path} holds no token shards (no manifest.json). Make them with `hanlin data build`.")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise HanlinError(f"{file} is not the manifest of token shards (expected format {FORMAT!r}).")
    return manifest


def _mapped(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None, allow_pickle=False)
    except ValueError as error:
        raise HanlinError(f"{file} is not a sound array file: {error}. Build the shards again.") from error
