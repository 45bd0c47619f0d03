"""Atomic files: a reader sees the old file or the whole new one, never a torn one, even after `kill -9`.

Write to a temporary name in the same folder, fsync the file, rename over the target, fsync the folder.
A folder (a checkpoint) is written under a temporary name and renamed as a whole.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError

TEMPORARY = ".partial-"  # prefix of everything unfinished; `sweep_partial` removes leftovers


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield a temporary file path beside `path`; on success it is fsynced and renamed over `path`.

    On any exception the temporary file is removed and the old `path` is untouched.
    A full disk is reported as a `HanlinError` that names the file and the space left.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        with disk_errors(target):
            yield temporary
            fsync(temporary)
            temporary.replace(target)
            fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield a temporary folder; on success every file in it is fsynced and the folder is renamed to `path`.

    An existing folder at `path` is exchanged with the new one in one step, then deleted. (Where the system has no such
    step, macOS and Windows, there is a moment without either; never one with half of it.)
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(target):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                fsync(file)
            fsync(temporary)
            move_folder(temporary, target)
            fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically (NaN and infinity are refused: they are not JSON)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; a missing or malformed file is a `HanlinError` that names the file and the place."""
    file = Path(path)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HanlinError(f"{file} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HanlinError(f"{file} is not valid JSON: {error}.") from error


def sweep_partial(folder: str | os.PathLike[str]) -> None:
    """Delete what a killed process left unfinished in `folder` (call it when no other process writes there)."""
    for leftover in Path(folder).glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def file_crc32(path: str | os.PathLike[str]) -> str:
    """CRC-32 of a file, eight hexadecimal digits, in pieces: against accidents, 3 times as fast as SHA-256."""
    found = 0
    with Path(path).open("rb") as stream:
        while piece := stream.read(1 << 20):
            found = zlib.crc32(piece, found)
    return f"{found:08x}"


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal, read in pieces."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def move_folder(new: Path, target: Path) -> None:
    """Rename a finished folder to `target`; one that stands there is exchanged with it in one step, then deleted."""
    if not target.exists():
        new.replace(target)
    elif not _exchange(new, target):
        old = target.with_name(f"{TEMPORARY}old-{os.getpid()}-{target.name}")
        target.replace(old)
        new.replace(target)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux's renameat2); False where system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform.startswith("linux") else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def fsync(path: Path) -> None:
    """Until the disk holds the file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(target: Path) -> Generator[None]:
    """A full disk inside becomes a `HanlinError` that names `target` and the space left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(target.parent).free
        raise HanlinError(
            f"The disk is full: {target} could not be written ({free / 1e6:.0f} MB free in {target.parent}). "
            "Nothing that was there before is lost. Free some space and run the same command again; it continues."
        ) from error
