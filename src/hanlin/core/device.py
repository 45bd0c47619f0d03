"""Where to compute and in which precision, decided by measuring; what the machine is; how much memory a run took.

torch is imported inside, so that this file costs nothing until it is used.
"""

import ctypes
import os
import platform
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    import torch

FASTER = 1.15  # bf16 must win a bare product by this much to pay for the casts around it


def choose_device(name: str = "auto") -> "torch.device":
    """`auto`: the first CUDA device if there is one, else the CPU. Any other name must exist on this machine."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise HanlinError(f"Unknown device `{name}`; it is one of: auto, cpu, cuda, cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU was found"
        raise HanlinError(f"The device `{name}` is not available: {why}. Use `cpu`, or `auto` to take what there is.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HanlinError(f"The device `{name}` is not available: this machine has {torch.cuda.device_count()} GPUs.")
    if device.type not in ("cpu", "cuda"):
        raise HanlinError(f"The device `{name}` is not supported; use cpu, cuda or auto.")
    return device


def choose_dtype(precision: str, device: "torch.device") -> "torch.dtype":
    """Of the activations: `fp32`, `bf16` and `fp16` as they say; `fp8`: bf16, around matrix products in 8 bits; `auto`:
    bf16 where it is faster (CPU: measured) or has its own units (CUDA)."""
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    if precision in named:
        return named[precision]
    if precision != "auto":
        raise HanlinError(f"Unknown precision `{precision}`; it is one of: auto, {', '.join(named)}.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_speedup_of_bf16() >= FASTER else torch.float32


@cache
def cpu_speedup_of_bf16() -> float:
    """How many times faster a matrix product is in bf16 than in fp32 on this CPU. About 50 ms, once a process.

    The product is a training step's: 2048 tokens through 384 × 1024. The best of a few interleaved tries each, because
    another process can only make one slower. A CPU with AMX gave 4.3; one without bf16 units emulates them and loses.
    """
    import torch

    pairs = {}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2048, 384, generator=generator).to(dtype)
        pairs[dtype] = (x, torch.randn(1024, 384, generator=generator).to(dtype))
    best = dict.fromkeys(pairs, float("inf"))
    with torch.inference_mode():
        started = time.perf_counter()
        for attempt in range(8):
            for dtype, (x, weight) in pairs.items():
                before = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                if attempt:  # the first call of a dtype sets kernels up
                    best[dtype] = min(best[dtype], time.perf_counter() - before)
            if attempt > 1 and time.perf_counter() - started > 0.05:
                break
    return best[torch.float32] / best[torch.bfloat16]


@cache
def tune_allocator() -> bool:
    """Keep freed memory in the heap (glibc): the next step's activations then need no fresh pages from the kernel.

    By default glibc maps every large tensor anew and unmaps it at once, and the kernel zeroes each page again; on a CPU
    that took 10–50 % of a training step. True if it was set; False, and harmless, elsewhere. Once a process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    largest = 2**31 - 1  # an int
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, largest))


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU if it used one, else resident in RAM."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before this program began
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, but bytes on macOS


def machine_summary() -> dict[str, Any]:
    """What a measurement was made on: `cpu, cores, threads, memory_gb, gpu, python, torch, system`."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Cores that this process may use (a container or `taskset` may allow fewer than there are)."""
    if sys.platform.startswith("linux"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
