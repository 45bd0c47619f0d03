"""Who shares a job changes nothing: more threads, several callers at once, a forked process that has no helpers."""

import os
import threading
import time

import pytest
import torch

from hanlin.kernels.library import library
from hanlin.kernels.linear import PackedProduct
from hanlin.kernels.paged_attention import PagedStep

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels cannot be built here")

DTYPES = [torch.float32, torch.bfloat16]


def products(dtype: torch.dtype, x: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, x.shape[1], generator=generator).to(dtype) for n in (2100, 33, 777)]
    return [PackedProduct(weight, None)(x) for weight in weights]


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_threads_change_no_bit(dtype):
    assert LIBRARY is not None
    torch.manual_seed(0)
    x = torch.randn(19, 520).to(dtype)
    starts, counts = [1799, 3, 500, 777], [1, 1, 40, 2]
    q, k, v = (torch.randn(44, heads, 64).to(dtype) for heads in (8, 2, 2))
    keys, values = torch.randn(202, 2, 16, 64).to(dtype), torch.randn(202, 2, 16, 64).to(dtype)
    first = [1, 120, 122, 150]
    tables = [list(range(at, at + -(-(s + c) // 16))) for at, s, c in zip(first, starts, counts, strict=True)]
    step = PagedStep(starts, counts, tables, 16)

    def attend() -> torch.Tensor | None:
        return step.attend(q, k, v, keys, values, scale=0.1, window=0)

    before, attended = products(dtype, x), attend()
    LIBRARY.long.hanlin_threads(4)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(products(dtype, x), before, strict=True))
        found = attend()
        assert found is not None and attended is not None and torch.equal(found, attended)


def test_two_callers_at_once():
    assert LIBRARY is not None
    LIBRARY.long.hanlin_threads(3)
    x = torch.randn(5, 600)
    product = PackedProduct(torch.randn(3000, 600), None)
    expected, wrong = product(x), []

    def call() -> None:
        for _ in range(200):
            if not torch.equal(product(x), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes_alone():
    assert LIBRARY is not None
    LIBRARY.long.hanlin_threads(3)
    x, product = torch.randn(5, 600), PackedProduct(torch.randn(3000, 600), None)
    expected = product(x)
    for _ in range(50):
        time.sleep(0.004)  # helpers have gone to sleep, and are being woken
        product(x)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(product(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
