"""The C++ of this room as a loaded library with a plain C interface.

It is compiled for this very CPU by the system's compiler (`c++`, or `$CXX`) when it is first needed, a few seconds
once, and kept in `~/.cache/hanlin/kernels` (`$XDG_CACHE_HOME`) under a name that changes with the source, the compiler
and the CPU. Without a compiler there is one line of notice, and torch's operations are used. `HANLIN_KERNELS=off` does
the same.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path
from hanlin.core.progress import say

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-fno-math-errno", "-w")
LINK = ("-shared", "-fPIC", "-pthread")
SWITCH = "HANLIN_KERNELS"
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
MOST_THREADS = 16  # more would wait for memory, and for each other

POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {  # of the C functions
    "pack": (POINTER, INTEGER, INTEGER, POINTER),
    "linear": (POINTER, POINTER, POINTER, INTEGER),
    "rms_norm": (POINTER, INTEGER, INTEGER, INTEGER, INTEGER, POINTER, REAL, POINTER),
    "rotate": (POINTER, INTEGER, INTEGER, INTEGER, INTEGER, POINTER, POINTER, INTEGER, INTEGER, POINTER),
    "swiglu": (POINTER, INTEGER, INTEGER, POINTER),
    "paged_write": (POINTER, *(POINTER, INTEGER) * 2, POINTER, POINTER),
    "paged_attend": (POINTER, *(POINTER, INTEGER) * 3, *(POINTER,) * 5),
    "train_swiglu": (POINTER, INTEGER, INTEGER, POINTER),
    "train_swiglu_backward": (POINTER, POINTER, INTEGER, INTEGER, POINTER),
    "train_norm": (POINTER, INTEGER, INTEGER, INTEGER, INTEGER, POINTER, REAL, POINTER, POINTER),
    "train_norm_backward": (POINTER, *(INTEGER,) * 4, POINTER, POINTER, POINTER, POINTER, POINTER),
    "train_turn": (POINTER, *(INTEGER,) * 4, POINTER, POINTER, INTEGER, INTEGER, REAL, POINTER),
    "train_widen": (POINTER, INTEGER, INTEGER, POINTER),
    "train_attention": (POINTER,) * 7,
    "train_attention_backward": (POINTER,) * 11,
    "cross_entropy": (POINTER, POINTER, INTEGER, INTEGER, REAL, REAL, INTEGER, POINTER),
}
SHORT = ("rms_norm", "rotate", "swiglu")


@dataclass(frozen=True)
class Library:
    """The same code twice. long: calls let other Python threads run. short: calls of a few microseconds, which keep the
    interpreter's lock, because taking it back can cost more than they do."""

    long: ctypes.CDLL
    short: ctypes.PyDLL


@cache
def library() -> Library | None:
    """The library, built if need be; None where it cannot be, or must not."""
    setting = os.environ.get(SWITCH, "on")
    if setting not in ("on", "off"):
        raise HanlinError(f"{SWITCH} is {setting!r}; it is one of: on, off.")
    if setting == "off":
        return None
    try:
        path = build()
        loaded = Library(ctypes.CDLL(str(path)), ctypes.PyDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        why = f"{_reason(error)} ({SWITCH}=off hides this line.)"
        say(f"Without Hanlin's own CPU kernels, training and generating are slower: {why}")
        return None
    loaded.long.hanlin_threads(min(torch.get_num_threads(), MOST_THREADS))
    loaded.long.hanlin_team(POINTER(_parallel()))
    return loaded


@cache
def function(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """`hanlin_NAME_f32` or its bf16 twin as a callable over plain numbers; None where there is none."""
    loaded = library()
    if loaded is None or dtype not in SUFFIXES:
        return None
    found = getattr(loaded.short if name in SHORT else loaded.long, f"hanlin_{name}_{SUFFIXES[dtype]}")
    found.argtypes, found.restype = ARGUMENTS[name], None
    return found


def build() -> Path:
    """The compiled library's path. Raises `OSError` or `SubprocessError` where it cannot be made."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise OSError(f"there is no C++ compiler ({compiler[0]}).")
    sources = sorted(SOURCES.glob("*.cpp"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([version, *compiler, *FLAGS, *LINK, _cpu()]).encode())
    for file in sorted(SOURCES.iterdir()):
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(base) / "hanlin" / "kernels" / f"{key.hexdigest()[:20]}.so"
    if not target.exists():
        with atomic_path(target) as unfinished:
            command = [*compiler, *FLAGS, *map(str, sources), *LINK, "-o", str(unfinished)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return target


def _parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP that torch has loaded; None: torch has another thread pool."""
    loaded = getattr(os, "RTLD_NOLOAD", None)  # this process' copy, never a second one
    if loaded is None:
        return None
    for name in ("libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib"):
        try:
            return ctypes.cast(ctypes.CDLL(name, mode=loaded | os.RTLD_NOW).GOMP_parallel, POINTER).value
        except (OSError, AttributeError):
            continue
    return None


def _cpu() -> str:
    """What `-march=native` depends on: the same home may be mounted on another machine."""
    known = [platform.machine(), platform.system()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        known += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    else:
        known.append(platform.processor())
    return "\n".join(known)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line]
        return f"the C++ compiler failed{': ' + lines[0] if lines else ''}."
    return str(error)
