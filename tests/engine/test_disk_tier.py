"""Pages on disk come back bit for bit or not at all, whatever happens to the process, the file or the disk."""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.files import TEMPORARY
from hanlin.engine import page_file
from hanlin.engine.disk_tier import DiskTier
from hanlin.engine.page_file import footprint

PAGE = 5000  # bytes; two blocks on disk
TWO_BLOCKS = 8192


def key_of(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=20).digest()


def page_of(number: int, length: int = PAGE) -> Tensor:
    """A page that only its number decides, so that any process can tell whether it is right."""
    seed = hashlib.blake2b(b"%d" % number, digest_size=32).digest()
    return torch.frombuffer(bytearray((seed * (length // 32 + 1))[:length]), dtype=torch.uint8)


def open_tier(folder: Path, **changes) -> DiskTier:
    options = {"limit_bytes": 1 << 20, "page_bytes": PAGE, "identity": b"model", "on_error": print}
    tier = DiskTier(folder, **(options | changes))
    tier.flush()
    return tier


def read(tier: DiskTier, number: int) -> Tensor | None:
    into = torch.empty(PAGE, dtype=torch.uint8)
    return into if tier.load(key_of(number), into).result(10) else None


def put(tier: DiskTier, *numbers: int) -> None:
    for number in numbers:
        tier.store(key_of(number), page_of(number))
        tier.flush()


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def bytes_in(folder: Path) -> int:
    """What the files take, in whole blocks, unfinished ones too."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files_in(folder))


def half_written(folder: Path) -> list[Path]:
    """Pages whose writing has not ended."""
    return [path for path in files_in(folder) if path.name.startswith(TEMPORARY) and path.suffix == ".kv"]


def page_written_since(folder: Path, moment: int) -> bool:
    for path in folder.rglob("*.kv"):
        with contextlib.suppress(FileNotFoundError):
            if not path.name.startswith(TEMPORARY) and path.stat().st_mtime_ns > moment:
                return True
    return False


# ------------------------------------------------------------------------------------------------------ round trips


def every_pattern() -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)  # each NaN, infinity and denormal of 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float64])
def test_a_page_comes_back_bit_for_bit_with_every_nan(tmp_path, dtype):
    page = every_pattern().view(dtype).reshape(8, 4, -1)
    length = page.nbytes
    with open_tier(tmp_path, page_bytes={0: length, 1: 16}) as tier:
        tier.store(key_of(1), page)
    with open_tier(tmp_path, page_bytes={0: length, 1: 16}) as tier:
        into = torch.zeros_like(page)
        assert tier.load(key_of(1), into).result()
        assert torch.equal(into.reshape(-1).view(torch.int16), page.reshape(-1).view(torch.int16))


def test_pages_of_a_cache_made_in_inference_mode_are_stored_and_filled(tmp_path):
    with torch.inference_mode():
        pages = torch.rand(4, PAGE // 4)
        into = torch.zeros(4, PAGE // 4)
    with open_tier(tmp_path) as tier:
        tier.store(key_of(2), pages[2])
        tier.flush()
        assert tier.load(key_of(2), into[1]).result()
    with torch.inference_mode():
        assert torch.equal(into[1], pages[2])
        assert not into[[0, 2, 3]].any()


def test_a_page_is_copied_when_it_is_stored_and_found_before_it_is_written(tmp_path, monkeypatch):
    hold, write = threading.Event(), os.write
    tier = open_tier(tmp_path)
    monkeypatch.setattr(page_file.os, "write", lambda *args: hold.wait(10) and write(*args))
    page = page_of(1)
    tier.store(key_of(1), page)
    page.zero_()
    assert key_of(1) in tier
    assert torch.equal(read(tier, 1), page_of(1))
    assert tier.stats.stored == 0
    hold.set()
    tier.flush()
    assert tier.stats.stored == 1
    assert torch.equal(read(tier, 1), page_of(1))
    tier.close()


def test_a_load_does_not_wait_for_stores(tmp_path, monkeypatch):
    tier = open_tier(tmp_path)
    put(tier, 1)
    hold, write = threading.Event(), os.write
    monkeypatch.setattr(page_file.os, "write", lambda *args: hold.wait(10) and write(*args))
    for number in range(2, 9):
        tier.store(key_of(number), page_of(number))
    assert torch.equal(read(tier, 1), page_of(1))
    assert tier.stats.stored == 1
    hold.set()
    tier.close()


def test_pages_of_another_identity_are_not_found_but_count_and_age(tmp_path):
    with open_tier(tmp_path, identity=b"one") as tier:
        put(tier, 1, 2)
    with open_tier(tmp_path, identity=b"two", limit_bytes=3 * TWO_BLOCKS) as tier:
        assert key_of(1) not in tier
        assert read(tier, 1) is None
        assert (tier.stats.pages, tier.stats.bytes) == (2, 2 * TWO_BLOCKS)
        put(tier, 1, 3)
        assert tier.stats.evicted == 1
    with open_tier(tmp_path, identity=b"one") as tier:
        assert key_of(1) not in tier
        assert torch.equal(read(tier, 2), page_of(2))


# ----------------------------------------------------------------------------------------------- order and bound


def test_the_longest_unused_page_goes_first_and_a_restart_keeps_the_order(tmp_path):
    limit = 4 * TWO_BLOCKS
    with open_tier(tmp_path, limit_bytes=limit) as tier:
        put(tier, 1, 2, 3, 4)
        assert read(tier, 1) is not None  # used by reading
        put(tier, 2)  # used by storing again: only touched
        assert tier.stats.stored == 4
    with open_tier(tmp_path, limit_bytes=limit) as tier:
        put(tier, 5)
        assert [number for number in range(1, 6) if key_of(number) in tier] == [1, 2, 4, 5]
        put(tier, 6)
        assert [number for number in range(1, 7) if key_of(number) in tier] == [1, 2, 5, 6]
    with open_tier(tmp_path, limit_bytes=2 * TWO_BLOCKS) as tier:  # a smaller bound holds from the start
        assert [number for number in range(1, 7) if key_of(number) in tier] == [5, 6]
        assert len(files_in(tmp_path)) == 2


def test_the_bound_holds_at_every_moment(tmp_path, monkeypatch):
    limit, write, seen = 7 * TWO_BLOCKS, os.write, []

    def write_and_look(*args) -> int:
        written = write(*args)
        seen.append(bytes_in(tmp_path))  # with the unfinished page
        return written

    monkeypatch.setattr(page_file.os, "write", write_and_look)
    with open_tier(tmp_path, limit_bytes=limit) as tier:
        for number in range(100):
            tier.store(key_of(number), page_of(number))
            assert tier.stats.bytes <= limit
            if number % 20 == 0:
                tier.flush()
        tier.flush()
        assert tier.stats.bytes == limit
        assert tier.stats.evicted == 93
    assert max(seen) == limit


def test_a_full_queue_drops_the_store(tmp_path, monkeypatch):
    tier = open_tier(tmp_path, queue_bytes=3 * PAGE)
    hold, write = threading.Event(), os.write
    monkeypatch.setattr(page_file.os, "write", lambda *args: hold.wait(10) and write(*args))
    for number in range(5):
        tier.store(key_of(number), page_of(number))
    assert [key_of(number) in tier for number in range(5)] == [True] * 3 + [False] * 2
    assert tier.stats.dropped == 2
    hold.set()
    tier.flush()
    assert tier.stats.stored == 3
    hold.clear()
    for number in range(3, 6):  # there is room in it again
        tier.store(key_of(number), page_of(number))
    hold.set()
    tier.close()
    assert (tier.stats.stored, tier.stats.dropped) == (6, 2)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    strangers = [tmp_path / "notes.txt", tmp_path / "a/b/notes.kv", tmp_path / "a/b/.partial-x", tmp_path / "笔记.kv"]
    (tmp_path / "a/b").mkdir(parents=True)
    for path in strangers:
        path.write_text("keep 保留")
    with open_tier(tmp_path, limit_bytes=TWO_BLOCKS) as tier:
        put(tier, 1, 2, 3)
        assert tier.stats.pages == 1
    assert all(path.read_text() == "keep 保留" for path in strangers)


# --------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


DAMAGE = {
    "first byte": lambda path: flip(path, 0),
    "header": lambda path: flip(path, 30),
    "checksum": lambda path: flip(path, page_file.HEADER - 1),
    "first number": lambda path: flip(path, page_file.HEADER),
    "last number": lambda path: flip(path, -1),
    "cut": lambda path: os.truncate(path, PAGE),
    "cut in the header": lambda path: os.truncate(path, 10),
    "empty": lambda path: path.write_bytes(b""),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(page_file.HEADER + PAGE)),
    "another page": lambda path: shutil.copy(path, path),  # replaced in the test
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("restart", [False, True])
def test_a_damaged_page_is_a_miss_and_is_removed_with_one_notice(tmp_path, damage, restart):
    notices = []
    tier = open_tier(tmp_path, on_error=notices.append)
    put(tier, 1)
    (path,) = files_in(tmp_path)
    if damage == "another page":
        put(tier, 2)
        (other,) = set(files_in(tmp_path)) - {path}
        shutil.copy(other, path)
    else:
        DAMAGE[damage](path)
    if restart:
        tier.close()
        tier = open_tier(tmp_path, on_error=notices.append)
    assert key_of(1) in tier
    assert read(tier, 1) is None
    assert not path.exists()
    assert key_of(1) not in tier
    assert read(tier, 1) is None
    assert tier.stats.corrupt == 1
    assert len(notices) == 1
    assert str(path) in notices[0]
    put(tier, 1)  # and can be stored again
    assert torch.equal(read(tier, 1), page_of(1))
    assert tier.stats.bytes == len(files_in(tmp_path)) * TWO_BLOCKS
    tier.close()


def test_a_page_that_somebody_removed_is_a_miss(tmp_path):
    with open_tier(tmp_path) as tier:
        put(tier, 1, 2)
        shutil.rmtree(tmp_path)
        assert read(tier, 1) is None
        assert key_of(1) not in tier
        assert tier.stats.corrupt == 0
        put(tier, 3)  # the folder comes back
        assert torch.equal(read(tier, 3), page_of(3))


def test_too_many_open_files_is_a_miss_that_removes_nothing(tmp_path, monkeypatch):
    with open_tier(tmp_path) as tier:
        put(tier, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
            assert read(tier, 1) is None
        assert torch.equal(read(tier, 1), page_of(1))


# ------------------------------------------------------------------------------------------------------ a full disk


def test_a_full_disk_stops_stores_with_one_notice_until_there_is_room_again(tmp_path, monkeypatch):
    notices, write, full, tries = [], os.write, [True], []

    def write_a_little(descriptor: int, data: memoryview) -> int:
        """As a full disk does it: some bytes still fit."""
        tries.append(descriptor)
        if not full[0]:
            return write(descriptor, data)
        if len(data) > 1000:
            return write(descriptor, data[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    now = [0.0]
    tier = open_tier(tmp_path, on_error=notices.append, retry_seconds=30.0, clock=lambda: now[0])
    put(tier, 1)
    monkeypatch.setattr(page_file.os, "write", write_a_little)
    put(tier, 2)
    tried = len(tries)
    put(tier, 3, 4)  # not even tried
    assert len(tries) == tried > 0
    assert tier.stats.dropped == 3
    assert len(notices) == 1
    assert "No space left" in notices[0]
    assert len(files_in(tmp_path)) == 1  # nothing half written remains
    assert torch.equal(read(tier, 1), page_of(1))
    now[0] += 31
    put(tier, 2)  # tried again, still full, not told again
    assert tier.stats.dropped == 4
    assert len(notices) == 1
    full[0] = False
    now[0] += 31
    put(tier, 2, 3)
    assert torch.equal(read(tier, 2), page_of(2))
    assert torch.equal(read(tier, 3), page_of(3))
    full[0] = True
    put(tier, 4)  # the next time is told again
    assert len(notices) == 2
    tier.close()


def test_pages_in_the_queue_are_dropped_when_the_disk_is_full(tmp_path, monkeypatch):
    hold = threading.Event()

    def fail(*_) -> int:
        hold.wait(10)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    tier = open_tier(tmp_path)
    monkeypatch.setattr(page_file.os, "write", fail)
    for number in range(6):
        tier.store(key_of(number), page_of(number))
    hold.set()
    tier.flush()
    assert not any(key_of(number) in tier for number in range(6))
    assert tier.stats.dropped == 6
    tier.close()
    assert not files_in(tmp_path)


# ------------------------------------------------------------------------------------- arguments, start and end


@pytest.mark.parametrize("below", ["file", "file/folder", "/proc/hanlin"])
def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(HanlinError, match=f"cannot use the folder .*{below}"):
        open_tier(tmp_path / below)


def test_a_bound_below_one_page_is_refused(tmp_path):
    with pytest.raises(HanlinError, match="one page of this model takes 8192"):
        open_tier(tmp_path, limit_bytes=TWO_BLOCKS - 1)
    with open_tier(tmp_path, limit_bytes=TWO_BLOCKS) as tier:
        put(tier, 1, 2)
        assert tier.stats.pages == 1


def test_wrong_calls_are_errors_of_the_caller(tmp_path):
    with open_tier(tmp_path) as tier:
        for key in (b"short", bytes(33)):
            with pytest.raises(ValueError, match="16 to 32 bytes"):
                tier.store(key, page_of(1))
        with pytest.raises(ValueError, match="a page has"):
            tier.store(key_of(1), page_of(1, 100))
        with pytest.raises(ValueError, match="contiguous"):
            tier.load(key_of(1), torch.zeros(2 * PAGE, dtype=torch.uint8)[::2])
        with pytest.raises(ValueError, match="meta"):
            tier.load(key_of(1), torch.zeros(PAGE, dtype=torch.uint8, device="meta"))


def test_close_writes_what_is_queued_and_may_be_called_twice(tmp_path):
    tier = open_tier(tmp_path)
    for number in range(20):
        tier.store(key_of(number), page_of(number))
    tier.close()
    tier.close()
    assert tier.stats.stored == 20
    assert read(tier, 1) is None  # closed
    tier.store(key_of(99), page_of(99))
    assert tier.stats.dropped == 1
    with open_tier(tmp_path) as tier:
        assert all(torch.equal(read(tier, number), page_of(number)) for number in range(20))


def test_a_folder_that_cannot_be_listed_stores_nothing_until_it_can(tmp_path, monkeypatch):
    with open_tier(tmp_path) as tier:
        put(tier, 1, 2)
    scandir, notices, now = os.scandir, [], [0.0]
    monkeypatch.setattr(
        page_file.os, "scandir", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    tier = open_tier(tmp_path, on_error=notices.append, clock=lambda: now[0], limit_bytes=2 * TWO_BLOCKS)
    put(tier, 3)
    now[0] += 31
    put(tier, 3)
    assert tier.stats.stored == 0
    assert len(notices) == 1
    monkeypatch.setattr(page_file.os, "scandir", scandir)
    now[0] += 31
    put(tier, 3)
    assert [number for number in (1, 2, 3) if key_of(number) in tier] == [2, 3]
    tier.close()


# ------------------------------------------------------------------------------------------------ other processes


def test_two_processes_find_each_others_pages_and_keep_the_bound(tmp_path):
    limit = 6 * TWO_BLOCKS
    one = open_tier(tmp_path, limit_bytes=limit, look_seconds=0.0)
    two = open_tier(tmp_path, limit_bytes=limit, look_seconds=0.0)
    put(one, 1, 2, 3)
    assert key_of(1) not in two
    assert torch.equal(read(two, 1), page_of(1))  # asked for, it is found
    assert key_of(1) in two
    put(two, 11)
    assert key_of(2) in two  # by the look that follows a write
    put(two, 12, 13, 14)
    assert bytes_in(tmp_path) == limit
    (gone,) = (number for number in (1, 2, 3, 11, 12, 13, 14) if key_of(number) not in two)
    assert read(one, gone) is None  # removed by the other: a miss, no damage
    assert one.stats.corrupt == 0
    put(one, 4)
    put(one, 5)
    assert bytes_in(tmp_path) == limit
    one.close()
    two.close()


def test_a_page_used_by_the_other_process_is_spared(tmp_path):
    limit = 3 * TWO_BLOCKS
    with open_tier(tmp_path, limit_bytes=limit) as one, open_tier(tmp_path, limit_bytes=limit) as two:
        put(one, 1, 2, 3)
        assert read(two, 1) is not None
        put(one, 4)
        assert [number for number in (1, 2, 3, 4) if key_of(number) in one] == [1, 3, 4]


def test_the_unfinished_page_of_a_live_process_is_not_swept(tmp_path, monkeypatch):
    hold, write, began = threading.Event(), os.write, threading.Event()

    def wait(*args) -> int:
        began.set()
        hold.wait(10)
        return write(*args)

    tier = open_tier(tmp_path)
    monkeypatch.setattr(page_file.os, "write", wait)
    tier.store(key_of(1), page_of(1))
    assert began.wait(10)
    open_tier(tmp_path).close()
    assert [path.name.startswith(TEMPORARY) for path in files_in(tmp_path)] == [True]
    hold.set()
    tier.close()
    with open_tier(tmp_path) as tier:
        assert torch.equal(read(tier, 1), page_of(1))


# Forks a process at each line it reads, which stores pages without end; prints its number. Imports only once.
WRITERS = """
import os, signal, sys
from pathlib import Path
from tests.engine.test_disk_tier import key_of, open_tier, page_of

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    folder, limit, pages = line.split()
    child = os.fork()
    if not child:
        tier = open_tier(Path(folder), limit_bytes=int(limit), look_seconds=0.02)
        number = os.getpid()
        while True:
            for number in range(number, number + 5):
                tier.store(key_of(number % int(pages)), page_of(number % int(pages)))
            tier.flush()
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def start_writer():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", WRITERS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def start(folder: Path, limit: int, pages: int) -> int:
        print(folder, limit, pages, file=process.stdin, flush=True)
        return int(process.stdout.readline())

    yield start
    process.communicate("")


def test_a_process_killed_while_it_writes_leaves_whole_pages_and_nothing_else(tmp_path, start_writer):
    chance, limit, pages, killed_writing = random.Random(0), 40 * TWO_BLOCKS, 97, 0
    for kill in range(100):
        began = time.time_ns()
        writer = start_writer(tmp_path, limit, pages)
        while not page_written_since(tmp_path, began):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(writer, signal.SIGKILL)
        while Path(f"/proc/{writer}").exists():  # its locks go with it
            time.sleep(0.001)
        killed_writing += bool(half_written(tmp_path))
        assert bytes_in(tmp_path) <= limit
        with open_tier(tmp_path, limit_bytes=limit) as tier:
            assert not [path for path in files_in(tmp_path) if path.name.startswith(TEMPORARY)]
            found = [number for number in range(pages) if key_of(number) in tier]
            assert len(found) == tier.stats.pages == len(files_in(tmp_path)) > 0
            assert all(torch.equal(read(tier, number), page_of(number)) for number in found)
            assert tier.stats.corrupt == 0
        if kill >= 11 and killed_writing:
            return
    pytest.fail("no kill came while a page was half written: this tested less than it says")


def test_processes_that_write_and_evict_in_one_folder_do_no_harm(tmp_path, start_writer):
    limit, pages = 12 * TWO_BLOCKS, 41
    writers = [start_writer(tmp_path, limit, pages) for _ in range(2)]
    chance, hits = random.Random(0), 0
    try:
        with open_tier(tmp_path, limit_bytes=limit, look_seconds=0.02) as tier:
            began = time.monotonic()
            while time.monotonic() < began + 1.5 or (not hits and time.monotonic() < began + 60):
                number = chance.randrange(pages)
                page = read(tier, number)
                hits += page is not None
                assert page is None or torch.equal(page, page_of(number))
                tier.store(key_of(number), page_of(number))
            assert tier.stats.corrupt == 0
            assert hits > 0
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
    while any(Path(f"/proc/{writer}").exists() for writer in writers):
        time.sleep(0.001)
    with open_tier(tmp_path, limit_bytes=limit) as tier:
        assert bytes_in(tmp_path) <= limit
        found = [number for number in range(pages) if key_of(number) in tier]
        assert all(torch.equal(read(tier, number), page_of(number)) for number in found)
        assert len(found) == len(files_in(tmp_path))


# ------------------------------------------------------------------------------------- any sequence of operations


LENGTHS = {0: PAGE, 1: 3000, 2: 20}  # two blocks, one, one


class TierAgainstADictionary(RuleBasedStateMachine):
    """A dictionary in order of use, bounded by whole blocks, says which pages must be there after every step."""

    LIMIT = 5 * TWO_BLOCKS
    keys = Bundle("keys")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hanlin-tier-"))
        self.model: OrderedDict[int, None] = OrderedDict()
        self.damaged: set[int] = set()
        self.tier = self.open()

    def open(self) -> DiskTier:
        return open_tier(self.folder, limit_bytes=self.LIMIT, page_bytes=LENGTHS, on_error=lambda _: None)

    def length(self, number: int) -> int:
        return LENGTHS[number % 3]

    @rule(target=keys, number=st.integers(0, 15))
    def name(self, number: int) -> int:
        return number

    @rule(number=keys)
    def store(self, number: int) -> None:
        self.tier.store(key_of(number), page_of(number, self.length(number)))
        self.tier.flush()
        if number in self.model:
            self.model.move_to_end(number)
            return
        while sum(footprint(self.length(n)) for n in [*self.model, number]) > self.LIMIT:
            self.damaged.discard(self.model.popitem(last=False)[0])
        self.model[number] = None

    @rule(number=keys)
    def load(self, number: int) -> None:
        into = torch.empty(self.length(number), dtype=torch.uint8)
        found = self.tier.load(key_of(number), into).result(10)
        assert found == (number in self.model and number not in self.damaged)
        if found:
            assert torch.equal(into, page_of(number, self.length(number)))
            self.model.move_to_end(number)
        elif number in self.model:
            del self.model[number]
            self.damaged.discard(number)

    @rule(number=keys, place=st.integers(0, 10**6))
    def damage(self, number: int, place: int) -> None:
        if number in self.model and number not in self.damaged:
            path = page_file.page_path(self.folder, self.tier._digest(key_of(number)))
            times = path.stat()
            flip(path, place % path.stat().st_size)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            self.damaged.add(number)

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = self.open()

    @rule()
    def restart_after_a_kill(self) -> None:
        self.tier.close()
        (self.folder / "4/2").mkdir(parents=True, exist_ok=True)
        (self.folder / f"4/2/{TEMPORARY}01234567-42{'0' * 30}.kv").write_bytes(b"half a page")
        self.tier = self.open()

    @invariant()
    def the_folder_holds_what_the_dictionary_says(self) -> None:
        assert [number for number in range(16) if key_of(number) in self.tier] == sorted(self.model)
        assert len(files_in(self.folder)) == len(self.model) == self.tier.stats.pages
        assert self.tier.stats.bytes == sum(footprint(self.length(number)) for number in self.model) <= self.LIMIT

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.folder)


TestTierAgainstADictionary = TierAgainstADictionary.TestCase
TestTierAgainstADictionary.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
