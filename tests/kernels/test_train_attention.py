"""Attention of whole sequences: values and gradients are those of the equation in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanlin.kernels import train_attention
from hanlin.nn.block_attention import block_attention

pytestmark = pytest.mark.skipif(
    not train_attention.usable(torch.zeros(1)), reason="this CPU, or the lack of a compiler, leaves it to torch"
)


def heads_of_a_projection(rows: int, length: int, counts: tuple[int, ...], widths: tuple[int, ...], dtype: torch.dtype):
    sizes = [count * width for count, width in zip(counts, widths, strict=True)]
    parts = torch.randn(rows, length, sum(sizes)).to(dtype).split(sizes, -1)
    shaped = [p.unflatten(-1, (c, w)) for p, c, w in zip(parts, counts, widths, strict=True)]
    return [x.transpose(1, 2).detach().requires_grad_() for x in shaped]  # (rows, heads, T, width), not contiguous


def equation(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    if bias is not None:
        scores = scores + bias.double()
    elif causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(group, 1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3), length=st.integers(1, 40) | st.sampled_from([63, 64, 65, 150]),
    kv_heads=st.integers(1, 3), group=st.integers(1, 3), width=st.integers(1, 40) | st.just(64),
    value_width=st.integers(1, 40) | st.just(64), causal=st.booleans(), bias_of=st.sampled_from(["", "row", "head"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_values_and_gradients(rows, length, kv_heads, group, width, value_width, causal, bias_of, dtype, seed):
    torch.manual_seed(seed)
    heads = kv_heads * group
    q, k, v = heads_of_a_projection(rows, length, (heads, kv_heads, kv_heads), (width, width, value_width), dtype)
    bias = None
    if bias_of:
        bias = torch.randn(rows if bias_of == "row" else 1, heads if bias_of == "head" else 1, length, length).to(dtype)
        hidden = torch.rand(bias.shape) < 0.3
        if causal:
            hidden |= torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden[..., range(length), range(length)] = False
        bias = bias.masked_fill(hidden, float("-inf"))
    out = block_attention(q, k, v, bias, 0.3, causal=causal)
    grad = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = equation(*exact, bias, 0.3, causal)
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    largest, floor = (5e-6, 1.0) if dtype == torch.float32 else (2e-2, 0.5)  # floor: for gradients that cancel
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= largest * (b.norm() + floor * b.numel() ** 0.5)


def test_a_result_depends_on_its_row_alone_and_not_on_threads():
    torch.manual_seed(0)
    q, k, v = heads_of_a_projection(5, 96, (4, 2, 2), (32, 32, 32), torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for count, rows in ((1, slice(0, 5)), (2, slice(0, 5)), (3, slice(0, 5)), (2, slice(0, 2))):
            torch.set_num_threads(count)
            out = block_attention(q[rows], k[rows], v[rows], None, 0.2, causal=True)
            found.append([out[:2], *(g[:2] for g in torch.autograd.grad(out.sum(), (q, k, v)))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_matrix_units_are_left_as_torch_set_them_up():
    """AMX products of torch before and behind the kernel, on the same threads."""
    torch.manual_seed(0)
    a, b = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    expected = a @ b
    q, k, v = heads_of_a_projection(4, 64, (2, 2, 2), (32, 32, 32), torch.bfloat16)
    for _ in range(3):
        block_attention(q, k, v, None, 0.2, causal=True).sum().backward()
        assert torch.equal(a @ b, expected)
