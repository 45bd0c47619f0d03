"""A page of keys and values as a file.

    folder/3/f/3f…c1.kv = magic, version, key length, identity, key, bytes, crc32 | the page's bytes as they stand

Nothing is fsynced, because it is a cache. A page is written under a temporary name and renamed, which is enough against
`kill -9`; after a power failure a name may stand over a torn file, and the checksum turns that into a miss.

crc32 takes 0.36 ms for 2 MB (one core; sha256 1.1 ms, blake2b 1.9 ms). It guards against accidents, not against people
who can write into the folder: they could give a page of their own a good checksum, whatever it is.

A half-written file is locked (flock) by its writer and unlocked by the system when that dies. So a leftover is told
from the work of another live process, in containers too, where process ids say nothing.
"""

import contextlib
import os
import re
import secrets
import struct
import sys
import zlib
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

from hanlin.core.files import TEMPORARY

MAGIC, VERSION = b"HanlinKV", 1
KEY_BYTES = 32  # a key has at most so many
FIELDS = struct.Struct(f"<8sHH16s{KEY_BYTES}sQ")  # magic, version, key length, identity, key (zeros behind), bytes
CHECKSUM = struct.Struct("<I")  # crc32 of the fields and the page
HEADER = FIELDS.size + CHECKSUM.size
BLOCK = 4096  # what a file takes on disk is rounded up to this
NAME = re.compile(rf"({re.escape(TEMPORARY)}[0-9a-f]{{8}}-)?([0-9a-f]{{32}})\.kv")


class OnDisk(NamedTuple):
    size: int  # bytes, in whole blocks
    used: int  # nanoseconds since 1970


def footprint(length: int) -> int:
    """Bytes on disk of a page of `length` bytes."""
    return _whole_blocks(HEADER + length)


def page_path(folder: Path, digest: bytes) -> Path:
    """Where the page named by these 16 bytes lies: in one of 256 folders, so that none becomes too long to list."""
    name = digest.hex()
    return folder / name[0] / name[1] / f"{name}.kv"


def write_page(path: Path, identity: bytes, key: bytes, page: bytes, used: int) -> None:
    """Write a page as a whole or not at all (OSError). used: becomes the file's mtime, in nanoseconds."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(temporary, flags, 0o644)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, flags, 0o644)
    try:
        _try_lock(descriptor)
        fields = _fields(identity, key, len(page))
        checksum = CHECKSUM.pack(zlib.crc32(page, zlib.crc32(fields)))
        for part in (memoryview(fields + checksum), memoryview(page)):
            while part:
                part = part[os.write(descriptor, part) :]
        os.utime(temporary, ns=(used, used))
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)


def read_page(stream: RawIOBase, identity: bytes, key: bytes, into: memoryview) -> bool:
    """Fill `into`. False: this is another page, or not a whole one, or its checksum is wrong."""
    fields = _fields(identity, key, len(into))
    header = stream.read(HEADER)
    if header is None or len(header) != HEADER or header[: FIELDS.size] != fields:
        return False
    room = into
    while room:
        read = stream.readinto(room)
        if not read:
            return False
        room = room[read:]
    (checksum,) = CHECKSUM.unpack_from(header, FIELDS.size)
    return not stream.read(1) and checksum == zlib.crc32(into, zlib.crc32(fields))


def list_pages(folder: Path) -> dict[bytes, OnDisk]:
    """All pages in `folder` by name, of whatever identity. Removes what killed processes left half written."""
    found: dict[bytes, OnDisk] = {}
    for start in (f"{first}{second}" for first in "0123456789abcdef" for second in "0123456789abcdef"):
        with contextlib.suppress(FileNotFoundError), os.scandir(folder / start[0] / start[1]) as entries:
            for entry in entries:
                name = NAME.fullmatch(entry.name)
                if not name or not name[2].startswith(start) or not entry.is_file(follow_symlinks=False):
                    continue  # not ours
                with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                    if name[1]:
                        _remove_abandoned(Path(entry.path))
                    else:
                        status = entry.stat(follow_symlinks=False)
                        found[bytes.fromhex(name[2])] = OnDisk(_whole_blocks(status.st_size), status.st_mtime_ns)
    return found


def _fields(identity: bytes, key: bytes, length: int) -> bytes:
    return FIELDS.pack(MAGIC, VERSION, len(key), identity, key, length)


def _whole_blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _remove_abandoned(temporary: Path) -> None:
    with temporary.open("rb") as stream:
        if _try_lock(stream.fileno()):
            temporary.unlink()


def _try_lock(descriptor: int) -> bool:
    """Lock a file until it is closed or its process dies. False: somebody has. Windows has no flock: always True."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
