"""Paged attention equals its twin, writes what it should, and gives a token the same bits in every company."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanlin.kernels.library import library
from hanlin.kernels.paged_attention import PagedStep, paged_twin

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16]
kernel = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")


@dataclass
class Case:
    """A step over shuffled pages; whatever the sequences do not hold is NaN, the null page too."""

    starts: list[int]
    counts: list[int]
    page: int
    q: Tensor
    k: Tensor
    v: Tensor | None
    keys: Tensor
    values: Tensor | None
    tables: list[list[int]]

    def step(self) -> PagedStep:
        return PagedStep(self.starts, self.counts, self.tables, self.page)

    def fresh(self) -> tuple[Tensor, Tensor | None]:
        return self.keys.clone(), None if self.values is None else self.values.clone()

    def attend(self, window=0, scale=0.3, **more) -> Tensor:
        found = self.step().attend(self.q, self.k, self.v, self.keys, self.values, scale=scale, window=window, **more)
        assert found is not None
        return found


def make(starts, counts, kv_heads=2, group=2, width=16, value_width=None, dtype=torch.float32, page=16, latent=False):
    """Queries, keys and values are slices of one projection where they can be, keys and values of a page one tensor."""
    value_width = value_width or width
    needed = [-(-(start + count) // page) for start, count in zip(starts, counts, strict=True)]
    pages = list(range(1, sum(needed) + 2))
    random.Random(0).shuffle(pages)
    tables = [[pages.pop() for _ in range(n)] for n in needed]
    each = kv_heads * page * width
    store = torch.full((sum(needed) + 2, each + (0 if latent else kv_heads * page * value_width)), NAN).to(dtype)
    keys = store[:, :each].view(-1, kv_heads, page, width)
    values = None if latent else store[:, each:].view(-1, kv_heads, page, value_width)
    for start, table in zip(starts, tables, strict=True):
        for at in range(0, start, page):
            held = min(page, start - at)
            for x in (keys,) if values is None else (keys, values):
                x[table[at // page], :, :held] = torch.randn(kv_heads, held, x.shape[3]).to(dtype)
    tokens, heads = sum(counts), kv_heads * group
    if width == value_width and not latent:
        q, k, v = torch.randn(tokens, heads + 2 * kv_heads, width).to(dtype).split([heads, kv_heads, kv_heads], 1)
    else:
        q, k = (torch.randn(tokens, n, width).to(dtype) for n in (heads, kv_heads))
        v = None if latent else torch.randn(tokens, kv_heads, value_width).to(dtype)
    return Case(starts, counts, page, q, k, v, keys, values, tables)


def formula(q, keys, values, position, scale, window, softcap, sink):
    """One query head of one token, number by number. keys, values: of its sequence, (length, D)."""
    scores = {}
    for i in range(position + 1):
        if not window or i > position - window:
            score = sum(a * b for a, b in zip(q.tolist(), keys[i].tolist(), strict=True)) * scale
            scores[i] = softcap * math.tanh(score / softcap) if softcap else score
    total = sum(map(math.exp, scores.values())) + (0 if sink is None else math.exp(sink))
    out = sum(math.exp(score) / total * values[i] for i, score in scores.items())
    return out, math.log(total)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(("window", "softcap", "sink"), [(0, 0.0, False), (3, 2.0, True)])
def test_the_twin_is_the_formula(latent, window, softcap, sink):
    torch.manual_seed(0)
    case = make([18, 0], [2, 4], group=3, width=6, value_width=4, dtype=torch.float64, latent=latent)
    keys, values = case.fresh()
    sinks, lse = torch.randn(6, dtype=torch.float64) if sink else None, torch.empty(6, 6, dtype=torch.float64)
    more = {"scale": 0.4, "window": window, "softcap": softcap, "sinks": sinks, "lse": lse}
    more["value_dim"] = 4 if latent else None
    found = paged_twin(case.step(), case.q, case.k, case.v, keys, values, **more)
    values, token = keys[..., :4] if values is None else values, 0
    for start, count, table in zip(case.starts, case.counts, case.tables, strict=True):
        for t in range(count):
            for head in range(6):
                own = [torch.cat([x[page, head // 3] for page in table]) for x in (keys, values)]
                at = None if sinks is None else float(sinks[head])
                out, total = formula(case.q[token, head], *own, start + t, 0.4, window, softcap, at)
                torch.testing.assert_close(found[token, head], out)
                assert float(lse[token, head]) == pytest.approx(total)
            token += 1


lengths = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 127, 200, 511, 513, 700]))


@kernel
@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(st.tuples(lengths, st.sampled_from([0, 1, 1, 1, 2, 5, 17, 64, 90])), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3), group=st.sampled_from([1, 2, 3, 5, 8]), latent=st.booleans(),
    width=st.sampled_from([1, 8, 16, 20, 64, 80, 96, 128]), value_width=st.sampled_from([None, 5, 48]),
    page=st.sampled_from([16, 32]), window=st.one_of(st.just(0), st.integers(1, 700)),
    softcap=st.sampled_from([0.0, 0.0, 5.0]), sunk=st.booleans(), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_attention_equals_its_twin(
    sequences, kv_heads, group, latent, width, value_width, page, window, softcap, sunk, dtype, seed
):
    torch.manual_seed(seed)
    case = make(*map(list, zip(*sequences, strict=True)), kv_heads, group, width, value_width, dtype, page, latent)
    tokens, heads = len(case.q), kv_heads * group
    twin, lse, twin_lse = case.fresh(), torch.empty(tokens, heads), torch.empty(tokens, heads)
    more = {"softcap": softcap, "sinks": torch.randn(heads) if sunk else None}
    more["value_dim"] = min(width, value_width or width) if latent else None
    found = case.attend(window, lse=lse, **more)
    expected = paged_twin(case.step(), case.q, case.k, case.v, *twin, scale=0.3, window=window, lse=twin_lse, **more)
    rtol, atol = (2e-5, 1e-5) if dtype == torch.float32 else (2**-7, 8e-3)  # tiles round weights to bf16
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(lse, twin_lse, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-4)
    for mine, its in zip((case.keys, case.values), twin, strict=True):
        if mine is not None:
            assert torch.equal(mine.nan_to_num(9), its.nan_to_num(9))


@kernel
@pytest.mark.parametrize("window", [0, 100])
def test_a_prompt_is_causal_attention(window):
    torch.manual_seed(0)
    case = make([0], [300], kv_heads=2, group=3, width=32)
    at = torch.arange(300)
    shown = (at[:, None] >= at) & (at[:, None] - at < (window or 300))
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k, case.v))
    expected = F.scaled_dot_product_attention(q, k, v, shown, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(case.attend(window), expected, rtol=1e-5, atol=1e-5)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "width", "value_width", "window"),
    [(2, 3, 64, 64, 0), (1, 8, 80, 48, 50), (2, 1, 20, 20, 0), (1, 20, 32, 32, 1), (1, 2, 128, 128, 530)],
)
def test_a_prompt_in_pieces_is_the_whole_prompt_to_the_last_bit(kv_heads, group, width, value_width, window, dtype):
    torch.manual_seed(0)
    total = 1100
    case = make([0], [total], kv_heads, group, width, value_width, dtype)
    keys, values = case.fresh()
    lse = torch.empty(total, kv_heads * group)
    whole = case.attend(window, lse=lse)
    for size in (7, 16, 500, 1):
        starts = range(0, total, size) if size > 1 else (0, 63, 64, 511, 512, 700, total - 1)
        for start in starts:
            here = slice(start, min(total, start + size))
            freed = max(0, start + 1 - window) // 16 if window else 0  # pages behind the window
            table = [0] * freed + case.tables[0][freed:]
            held = (case.keys, case.values) if size == 1 else (keys, values)
            part_lse = torch.empty(here.stop - start, kv_heads * group)
            found = PagedStep([start], [here.stop - start], [table], 16).attend(
                case.q[here], case.k[here], case.v[here], *held, scale=0.3, window=window, lse=part_lse
            )
            assert found is not None
            assert torch.equal(found, whole[here])
            assert torch.equal(part_lse, lse[here])


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_knows_no_other(dtype):
    torch.manual_seed(0)
    case = make([700, 3, 64, 0, 129, 1300], [1, 2, 40, 200, 1, 1], group=3, width=64, dtype=dtype)
    before = case.fresh()
    together, token = case.attend(), 0
    for start, count, table in zip(case.starts, case.counts, case.tables, strict=True):
        own = slice(token, token + count)
        alone = PagedStep([start], [count], [table], 16).attend(
            case.q[own], case.k[own], case.v[own], *(x.clone() for x in before), scale=0.3, window=0
        )
        assert alone is not None
        assert torch.equal(alone, together[own])
        token += count


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_sequence_breaks_no_other(dtype):
    case = make([70, 70], [1, 20], dtype=dtype)
    case.q[0] = NAN
    found = case.attend()
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
    case.k[0] = NAN
    case.q[0] = 1
    assert case.attend()[0].isnan().all()


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_broken_keys_are_not_passed_over(dtype):
    case = make([600], [1], dtype=dtype)
    case.keys[case.tables[0][:32]] = NAN  # all that is summed up on its own first
    assert case.attend().isnan().all()


@kernel
def test_a_page_written_in_this_step_can_be_read_by_another_sequence():
    torch.manual_seed(0)
    case = make([0, 16], [16, 1])
    case.tables[1][0] = case.tables[0][0]
    keys, values = case.fresh()
    expected = paged_twin(case.step(), case.q, case.k, case.v, keys, values, scale=0.3, window=0)
    torch.testing.assert_close(case.attend(), expected, rtol=1e-5, atol=1e-5)


@kernel
def test_large_scores_do_not_overflow():
    torch.manual_seed(0)
    case = make([150], [2])
    twin = case.fresh()
    found = case.attend(scale=1000.0)
    expected = paged_twin(case.step(), case.q, case.k, case.v, *twin, scale=1000.0, window=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@kernel
def test_writing_alone_writes_the_same():
    torch.manual_seed(0)
    case = make([30, 5], [40, 1])
    keys, values = case.fresh()
    assert case.step().write(case.k, case.v, keys, values)
    case.attend()
    assert torch.equal(keys.nan_to_num(9), case.keys.nan_to_num(9))
    assert torch.equal(values.nan_to_num(9), case.values.nan_to_num(9))


@kernel
def test_what_it_cannot_read_is_left_alone():
    case = make([4], [1])
    before = case.keys.clone()
    step, rest = case.step(), {"scale": 1.0, "window": 0}
    assert step.attend(case.q, case.k, case.v, case.keys.double(), case.values, **rest) is None
    assert (
        step.attend(case.q.half(), case.k.half(), case.v.half(), case.keys.half(), case.values.half(), **rest) is None
    )
    assert step.attend(case.q, case.k, case.v, case.keys.transpose(2, 3), case.values, **rest) is None
    assert step.attend(case.q.transpose(1, 2), case.k, case.v, case.keys, case.values, **rest) is None
    assert step.attend(case.q, case.k, case.v, case.keys, case.values, sinks=torch.ones(4).double(), **rest) is None
    assert step.attend(case.q, case.k, case.v, case.keys, case.values, scale=-1.0, window=0) is None
    assert step.attend(case.q, case.k, None, case.keys, case.values, **rest) is None
    elsewhere = PagedStep([4], [1], [[-3]], 16)  # a page that lies in another store
    assert elsewhere.attend(case.q, case.k, case.v, case.keys, case.values, **rest) is None
    small = make([4], [1], page=8)
    assert small.step().attend(small.q, small.k, small.v, small.keys, small.values, **rest) is None
    assert torch.equal(case.keys.nan_to_num(9), before.nan_to_num(9))


def test_tables_must_hold_the_tokens():
    with pytest.raises(ValueError, match="do not hold 17"):
        PagedStep([16], [1], [[1]], 16)
    case = make([4], [1])
    step = PagedStep([4], [1], [[99]], 16)
    if library() is not None:
        with pytest.raises(ValueError, match="99"):
            step.attend(case.q, case.k, case.v, case.keys, case.values, scale=1.0, window=0)
