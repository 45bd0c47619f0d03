"""Where to compute, in which precision, and what it took."""

import subprocess
import sys

import pytest
import torch

from hanlin.core.device import (
    choose_device,
    choose_dtype,
    cpu_speedup_of_bf16,
    machine_summary,
    peak_memory_bytes,
    tune_allocator,
)
from hanlin.core.errors import HanlinError


def test_auto_takes_what_there_is():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(HanlinError, match=f"`{name}`"):
        choose_device(name)


def test_precision_says_or_measures():
    cpu = torch.device("cpu")
    assert choose_dtype("fp32", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    assert choose_dtype("auto", cpu) == (torch.bfloat16 if cpu_speedup_of_bf16() >= 1.15 else torch.float32)
    assert (choose_dtype("fp16", cpu), choose_dtype("fp8", cpu)) == (torch.float16, torch.bfloat16)
    with pytest.raises(HanlinError, match="`fp4`"):
        choose_dtype("fp4", cpu)


def test_the_measurement_is_made_once():
    assert cpu_speedup_of_bf16() is cpu_speedup_of_bf16()
    assert 0 < cpu_speedup_of_bf16() < float("inf")  # how much is the machine's affair: a starved try may say anything


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_tuned_allocator_gives_back_the_same_pages():
    code = """
import resource, torch
from hanlin.core.device import tune_allocator
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20): torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
assert tune_allocator()
faults()
print(plain, faults())
"""
    plain, tuned = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(tuned) * 10 < int(plain), (plain, tuned)


def test_tuning_twice_does_no_harm():
    assert tune_allocator() == tune_allocator()


def test_the_summary_names_the_machine():
    summary = machine_summary()
    assert summary["torch"] == torch.__version__
    assert summary["cores"] >= 1
    assert summary["cpu"]


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_bytes()
    code = "from hanlin.core.device import peak_memory_bytes as peak; held = b'x' * (300 << 20); print(peak())"
    inside = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 300 << 20 < inside < 450 << 20
    assert before > 1 << 20
