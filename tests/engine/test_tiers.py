"""What the device has no room for goes to the host and to disk, and comes back bit for bit; what does not come back is
computed again."""

import errno
import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tests.engine.adapting import make_adapter
from tests.engine.tiny import greedy_uncached, make_model

from hanlin.engine import Engine, SamplingParams
from hanlin.engine.disk_tier import DiskTier
from hanlin.engine.page_pool import PagePool
from hanlin.engine.paged_cache import PagedCache
from hanlin.engine.tables import Tables, root_of
from hanlin.engine.tiers import Tiers
from hanlin.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [
    "lazy dog. " * 9,
    "敏捷的棕色狐狸跳过懒狗。" * 4,
    "The quick brown fox jumps over",
    "def f(x): return x + 1\n" * 5,
]


def open_tiers(folder: Path, dtype: torch.dtype, *, device: int, host: int) -> Tiers:
    layers = tuple(LayerConfig(AttentionConfig(2, 2, 4, window=w), FeedForwardConfig(8)) for w in (None, 6, None))
    cache = PagedCache(
        ModelConfig("llama", 11, 8, layers), pages=[device + 1] * 2, host_pages=[host + 1] * 2 if host else (),
        dtype=dtype, page=4,
    )  # fmt: skip
    tables = Tables(cache.groups, [PagePool(device + 1, first=1) for _ in cache.groups], 4)
    sizes = {group: cache.page_bytes(group) for group in range(2)}
    return Tiers(tables, cache, DiskTier(folder, limit_bytes=1 << 20, page_bytes=sizes, identity=b"us"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("host", [0, 2, 40])
def test_pages_come_back_bit_for_bit(tmp_path, dtype, host):
    """Device → host → disk → device: eight pages of each group through two of the device's."""
    tiers = open_tiers(tmp_path, dtype, device=2, host=host)
    tables, cache, disk = tiers.tables, tiers.cache, tiers.disk
    ids, written = list(range(32)), {}
    hashes = tables.start(b"root")
    tables.extend_hashes(hashes, ids, 8)
    for index, hashed in enumerate(hashes.hashes):
        for group, pool in enumerate(tables.pools):
            page, key = pool.take(), hashed + bytes([group])
            numbers = torch.randint(0, 256, (cache.page_bytes(group),), dtype=torch.uint8)  # every bit pattern, NaN too
            cache.store[group][page].view(torch.uint8).copy_(numbers)
            pool.publish(page, key)
            pool.drop(page)
            written[group, index] = key, numbers
    disk.flush()
    assert tiers.disk_pages == {0: 12, 2: 8, 40: 0}[host]
    assert tiers.host_pages == min(host, 6) * 2
    for (group, index), (key, numbers) in written.items():
        if tables.pools[group].find(key) is not None:
            continue  # still on the device
        table = tables.start(b"root")
        page = tables.pools[group].take()
        disk.flush()
        table.pages[group].append(page)
        cache.store[group][page] = 7
        ((_, place, came),) = tiers.load(table, [(group, page, key)])
        assert came.result(10), (group, index)
        assert torch.equal(cache.store[group][table.pages[group][place]].view(torch.uint8), numbers)
        tables.free(table, forget=True)
    disk.close()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("host", "disk"), [(40, False), (0, True), (60, True)])
def test_a_tiny_device_with_tiers_says_what_a_huge_one_says(tokenizer, tmp_path, window, host, disk):
    model = make_model(tokenizer, window=window)
    size = model.config.kv_bytes_per_token(8)
    expected = [greedy_uncached(model, tokenizer.encode(prompt), 12) for prompt in PROMPTS]
    limits = {"disk_folder": tmp_path} if disk else {}
    # a window holds little: all that lies behind it went down before
    tokens = 96 if window is None else 24
    with Engine(
        model, tokenizer, page_size=4, step_tokens=8, cache_bytes=tokens * size, host_bytes=host * size, **limits
    ) as engine:
        engine._worker.checking = True
        for order in (PROMPTS, PROMPTS[::-1], PROMPTS):
            for prompt in order:
                got = engine.generate(prompt, GREEDY)[0]
                assert got.token_ids == expected[PROMPTS.index(prompt)]
            if disk:
                engine._memory.tiers.disk.flush()
        together = engine.generate(PROMPTS * 2, GREEDY)
        assert [c.token_ids for c in together] == expected * 2
        engine._memory.tiers.check()
        assert engine.stats().loaded_pages > 0
        assert engine.stats().cache_usage == 0


def served(model, tokenizer, folder, prompts=PROMPTS, **more):
    """(token ids, cached tokens) of each prompt in an engine that begins with what `folder` has."""
    owner = {"adapter": more.pop("adapter")} if "adapter" in more else {}
    adapter = more.pop("files", None)
    with Engine(model, tokenizer, page_size=4, disk_folder=folder, **more) as engine:
        engine._memory.tiers.disk.flush()  # it looks at its folder in the background
        if adapter is not None:
            engine.load_adapter(owner["adapter"], adapter)
        got = engine.generate(prompts, GREEDY, **owner)
    return [c.token_ids for c in got], [c.usage.cached_tokens for c in got]


def test_a_restart_finds_its_pages_on_disk(model, tokenizer, tmp_path):
    first, cached = served(model, tokenizer, tmp_path)
    assert cached == [0] * 4
    again, cached = served(deepcopy(model), tokenizer, tmp_path)
    assert again == first
    assert cached == [(len(tokenizer.encode(prompt)) - 1) // 4 * 4 for prompt in PROMPTS]


def test_other_weights_never_find_each_others_pages(model, tokenizer, tmp_path):
    served(model, tokenizer, tmp_path)
    other = deepcopy(model)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.endswith("v_proj.weight")).mul_(1.5)
    got, cached = served(other, tokenizer, tmp_path)
    assert cached == [0] * 4
    assert got == [greedy_uncached(other, tokenizer.encode(prompt), 12) for prompt in PROMPTS]
    assert served(deepcopy(model).float(), tokenizer, tmp_path)[1] == [0] * 4  # nor another precision


def test_other_adapters_of_one_name_never_find_each_others_pages(model, tokenizer, tmp_path):
    merged = {seed: make_adapter(model, tmp_path / str(seed), seed=seed) for seed in (1, 2)}
    for seed, found in [(1, False), (2, False), (1, True)]:  # an engine each, as after a restart
        got, cached = served(
            deepcopy(model), tokenizer, tmp_path / "pages", adapter="mine", files=tmp_path / str(seed)
        )  # fmt: skip
        assert got == [greedy_uncached(merged[seed], tokenizer.encode(prompt), 12) for prompt in PROMPTS]
        assert all((n > 0) == found for n in cached)
    assert served(deepcopy(model), tokenizer, tmp_path / "pages")[1] == [0] * 4


@pytest.mark.parametrize("damage", ["a bit", "its end", "its header", "everything"])
def test_a_damaged_page_is_computed_again(model, tokenizer, tmp_path, damage, capsys):
    first, _ = served(model, tokenizer, tmp_path)
    files = list(tmp_path.rglob("*.kv"))
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        if damage == "a bit":
            content[-9] ^= 4
        elif damage == "its end":
            del content[-20:]
        elif damage == "its header":
            content[3] ^= 1
        else:
            content.clear()
        file.write_bytes(bytes(content))
    again, cached = served(model, tokenizer, tmp_path)
    assert again == first
    assert cached == [0] * 4
    assert served(model, tokenizer, tmp_path)[1] != [0] * 4  # it was written again
    assert "computed again" in "".join(capsys.readouterr())


def test_one_damaged_page_costs_only_what_stands_behind_it(model, tokenizer, tmp_path):
    prompt = tokenizer.encode(PROMPTS[0])
    first, _ = served(model, tokenizer, tmp_path, [prompt])
    with Engine(model, tokenizer, page_size=4, disk_folder=tmp_path) as engine:
        disk, tables = engine._memory.tiers.disk, engine._memory.tables
        disk.flush()
        table = tables.start(root_of(engine._memory.identity, "", ""))
        tables.extend_hashes(table, prompt, 3)
        path = disk._path(disk._digest(table.hashes[2] + b"\0"))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        (got,) = engine.generate([prompt], GREEDY)
    assert got.token_ids == first[0]
    assert got.usage.cached_tokens == 8


def test_a_full_disk_costs_nothing_but_the_pages(model, tokenizer, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hanlin.engine.disk_tier.write_page", full)
    size = model.config.kv_bytes_per_token(8)
    expected = [greedy_uncached(model, tokenizer.encode(prompt), 12) for prompt in PROMPTS]
    for _ in range(2):
        got, cached = served(model, tokenizer, tmp_path, cache_bytes=96 * size, step_tokens=8)
        assert got == expected
        assert cached == [0] * 4
    assert "No space left" in "".join(capsys.readouterr())
    assert not list(tmp_path.rglob("*.kv"))


SERVE = """
import sys
from tests.engine.conftest import TEXT
from tests.engine.test_tiers import GREEDY, PROMPTS
from tests.engine.tiny import make_model
from hanlin.engine import Engine
from hanlin.tokens import Tokenizer

tokenizer = Tokenizer.load(sys.argv[1])
model = make_model(tokenizer)
size = model.config.kv_bytes_per_token(8)
with Engine(model, tokenizer, page_size=4, cache_bytes=96 * size, disk_folder=sys.argv[2]) as engine:
    for turn in range(10**6):
        engine.generate([[turn % 300, *tokenizer.encode(p)] for p in PROMPTS] + PROMPTS, GREEDY)
        print(engine.stats().disk_pages, flush=True)
"""


def test_a_server_that_is_killed_while_it_writes_leaves_a_folder_to_go_on_with(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "pages"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path / "tokenizer"), str(folder)], stdout=subprocess.PIPE,
        text=True, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        while int(process.stdout.readline()) < 20:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    model = make_model(tokenizer)
    got, cached = served(model, tokenizer, folder)
    assert got == [greedy_uncached(model, tokenizer.encode(prompt), 12) for prompt in PROMPTS]
    assert sum(cached) > 0
