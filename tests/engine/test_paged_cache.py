"""A forward over pages equals the uncached one, however the tokens are cut into steps and sequences."""

import pytest
import torch
from tests.engine.paging import Book

from hanlin.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hanlin.models.transformer import Transformer

WINDOWS = {"full": [None, None], "window": [5, 5], "mixed": [None, 5], "two windows": [3, 6]}


def make_model(windows: list[int | None], **attention) -> Transformer:
    torch.manual_seed(0)
    layers = tuple(
        LayerConfig(AttentionConfig(4, 2, 8, qk_norm=True, window=window, **attention), FeedForwardConfig(48))
        for window in windows
    )
    config = ModelConfig(family="llama", layers=layers, vocab_size=61, width=32)
    model = Transformer(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=WINDOWS)
def model(request) -> Transformer:
    return make_model(WINDOWS[request.param])


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 1, 1, 11], [19, 1]])
def test_steps_equal_the_whole(model, cuts):
    ids = torch.randint(0, 61, (1, 20))
    book = Book(model.config, sequences=2, length=20, dtype=torch.float64)
    parts = [model(part, cache=book.step([0], part.shape[1])).logits for part in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_a_flat_batch_of_pieces_and_single_tokens_equals_each_alone(model):
    lengths, pieces = [3, 0, 9, 1], [1, 6, 1, 4]
    ids = [torch.randint(0, 61, (1, a + b)) for a, b in zip(lengths, pieces, strict=True)]
    book = Book(model.config, sequences=4, length=16, dtype=torch.float64)
    for row, (one, start) in enumerate(zip(ids, lengths, strict=True)):
        if start:
            model(one[:, :start], cache=book.step([row], start), logits=None)
    flat = torch.cat([one[:, start:] for one, start in zip(ids, lengths, strict=True)], 1)
    together = model(flat, cache=book.step(range(4), pieces, flat=True)).logits
    alone = [model(one).logits[:, start:] for one, start in zip(ids, lengths, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=1e-12)


@torch.inference_mode()
def test_a_window_lets_go_of_pages_it_has_passed(model):
    ids = torch.randint(0, 61, (1, 40))
    book = Book(model.config, sequences=1, length=40, dtype=torch.float64)
    for part in ids.split(1, dim=1):
        model(part, cache=book.step([0], 1), logits=None)
    for group, pages in zip(book.groups, book.rows[0].pages, strict=True):
        held = sum(page > 0 for page in pages)
        assert held == 10 - (0 if group.window is None else (39 + 1 - group.window) // 4)
    book.tables.check(book.rows)


@torch.inference_mode()
def test_a_forked_sequence_shares_pages_until_it_writes(model):
    ids = torch.randint(0, 61, (1, 10))
    book = Book(model.config, sequences=2, length=20, dtype=torch.float64)
    model(ids, cache=book.step([0], 10), logits=None)
    free = [pool.free for pool in book.pools]
    fork = book.tables.fork(book.rows[0], 10, 10)
    assert fork is not None
    book.rows[1], book.held[1] = fork, 10
    assert [pool.free for pool in book.pools] == free
    ends = torch.randint(0, 61, (2, 5))
    got = [model(ends[:, i : i + 1], cache=book.step([0, 1], 1)).logits for i in range(5)]
    book.tables.check(book.rows)
    assert [pool.free for pool in book.pools] != free
    whole = model(torch.cat([ids.expand(2, -1), ends], 1)).logits[:, 10:]
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=0, atol=1e-12)


@torch.inference_mode()
@pytest.mark.parametrize("attention", [{"softcap": 3.0}, {"sinks": True}, {}])
def test_pages_on_the_host_are_streamed_to_the_same_numbers(attention, monkeypatch):
    monkeypatch.setattr("hanlin.engine.paged_cache.STREAMED", 8)
    model = make_model([None, 5], **attention)
    ids = torch.randint(0, 61, (1, 30))
    book = Book(model.config, sequences=1, length=30, dtype=torch.float64)
    cache = type(book.cache)(model.config, pages=[9, 9], host_pages=[9, 9], dtype=torch.float64, page=4)
    book.cache = cache
    parts = []
    for index, part in enumerate(ids.split([11, 1, 10, 8], dim=1)):
        step = book.step([0], part.shape[1])
        parts.append(model(part, cache=step).logits)
        group = 0 if book.groups[0].window is None else 1
        held = book.rows[0].pages[group]
        for at in range(min(2 * index + 1, len(held) - 1)):  # the oldest move to the host
            if held[at] > 0:
                cache.host_store[group][at + 1] = cache.store[group][held[at]]
                cache.store[group][held[at]] = 1e9  # whoever still reads it is wrong
                book.pools[group].drop(held[at], forget=True)
                held[at] = -(at + 1)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-10)
