"""Atomic files: old or new, never torn: after an error, on a full disk, under `kill -9`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, atomic_path, file_hash, read_json, sweep_partial, write_json, write_text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB: a tmpfs of our own where we may mount one, else a limit on this process's files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here (this needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_full_disk_leaves_the_old_file_and_says_so(small_disk):
    target = small_disk / "metrics.json"
    write_text(target, "旧 old")
    with pytest.raises(HanlinError, match=r"The disk is full: .*metrics\.json could not be written \(0 MB free"):
        write_text(target, "x" * 1_000_000)
    assert target.read_text(encoding="utf-8") == "旧 old"
    assert names(small_disk) == ["metrics.json"]


def test_the_kernels_word_for_a_full_disk_is_translated(tmp_path):
    """The same without a file system of our own: the error itself is real, from /dev/full."""
    target = tmp_path / "x"
    write_text(target, "old")
    with pytest.raises(HanlinError, match="The disk is full: "), atomic_path(target) as temporary:
        temporary.write_text("half")
        Path("/dev/full").write_text("the rest")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_full_disk_leaves_the_old_folder(small_disk):
    target = small_disk / "step-1"
    with atomic_folder(target) as folder:
        (folder / "model").write_text("old")
    with pytest.raises(HanlinError, match="The disk is full"), atomic_folder(target) as folder:
        (folder / "model").write_bytes(bytes(1_000_000))
    assert (target / "model").read_text() == "old"
    assert names(small_disk) == ["step-1"]


def test_a_full_disk_is_one_paragraph_and_exit_2(small_disk):
    code = (
        "import sys, pathlib, hanlin.cli.schema as verb; from hanlin.core.files import write_text\n"
        "verb.main = lambda argv: write_text(pathlib.Path(argv[0]), 'x' * 1_000_000)\n"
        "from hanlin.cli import main; sys.exit(main(['schema', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(small_disk / "x")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("hanlin: The disk is full")
    assert "Traceback" not in done.stderr


def test_an_error_inside_leaves_the_old_file(tmp_path):
    target = tmp_path / "a" / "b.txt"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert names(target.parent) == ["b.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
        assert names(tmp_path / "model" / "sub") == [content]
    assert names(tmp_path) == ["model"]


def test_a_reader_never_misses_a_folder_that_is_being_replaced(tmp_path):
    """Also under `kill -9`: whatever moment it hits, the folder is there and whole."""
    code = (
        "import sys; from hanlin.core.files import atomic_folder\n"
        "for turn in range(10**9):\n"
        "    with atomic_folder(sys.argv[1]) as folder:\n"
        "        [(folder / name).write_text(str(turn)) for name in 'ab']\n"
    )
    target = tmp_path / "step-1"
    for attempt in range(5):
        writer = subprocess.Popen([sys.executable, "-c", code, str(target)])
        while not target.exists():
            time.sleep(0.01)
        time.sleep(0.05 + 0.013 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        sweep_partial(tmp_path)
        assert names(tmp_path) == ["step-1"]
        assert (target / "a").read_text() == (target / "b").read_text()


def test_sweep_removes_only_what_is_unfinished(tmp_path):
    (tmp_path / ".partial-1-x").write_text("half")
    (tmp_path / ".partial-1-folder").mkdir()
    (tmp_path / "whole").write_text("whole")
    sweep_partial(tmp_path)
    assert names(tmp_path) == ["whole"]


def test_json_round_trip_and_its_mistakes(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"名": [1, 2.5, None]})
    assert read_json(file) == {"名": [1, 2.5, None]}
    assert "名" in file.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, float("nan"))
    assert read_json(file) == {"名": [1, 2.5, None]}
    with pytest.raises(HanlinError, match="does not exist"):
        read_json(tmp_path / "y.json")
    file.write_text('{"a": 1,}')
    with pytest.raises(HanlinError, match=r"x\.json is not valid JSON: .*line 1 column 9"):
        read_json(file)


def test_the_hash_is_sha256s(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert file_hash(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_files_keep_the_usual_rights(tmp_path):
    write_text(tmp_path / "x", "")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask
