"""The compiled library: built once, found again, and done without where it cannot be."""

import os
import subprocess
import sys

import pytest

from hanlin.kernels.library import build, library

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")

ASK = """
import torch
from hanlin.kernels.library import library
from hanlin.nn.norms import rms_norm
with torch.no_grad():
    y = rms_norm(torch.ones(2, 8), torch.ones(8), 0.0)
assert (y == 1).all()
print(library() is not None)
"""


def ask(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_a_second_build_finds_the_first():
    path = build()
    before = path.stat().st_mtime_ns
    assert build() == path
    assert path.stat().st_mtime_ns == before


def test_the_cache_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "c++ -O0")
    path = build()
    assert path.is_relative_to(tmp_path / "hanlin" / "kernels")
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing unfinished is left


def test_without_a_compiler_there_is_one_line_and_torch(tmp_path):
    result = ask(CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert (result.returncode, result.stdout.strip()) == (0, "False")
    assert result.stderr.count("\n") == 1
    assert "no-such-compiler" in result.stderr


def test_a_failing_compiler_leaves_nothing_behind(tmp_path):
    result = ask(CXX="c++ -include no-such-header.h", XDG_CACHE_HOME=str(tmp_path))
    assert (result.returncode, result.stdout.strip()) == (0, "False")
    assert result.stderr.count("\n") == 1
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_the_switch_turns_them_off_without_a_word():
    result = ask(HANLIN_KERNELS="off")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "False", "")


def test_a_wrong_switch_is_refused():
    assert "HANLIN_KERNELS is 'no'" in ask(HANLIN_KERNELS="no").stderr
