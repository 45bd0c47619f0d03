"""Requests whose prompts begin alike meet on one replica, unless it is overloaded."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanlin.serve.affinity import SLACK, beginning_of, capacity, choose_replica, home_of

NAMES = st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=6, unique=True)
KEYS = st.binary(min_size=16, max_size=16)


def chat(*turns, **more):
    roles = ("system", "user", "assistant", "user", "assistant")
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]} | more


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("你是翰林。", "你好"), chat("你是翰林。", "你好", "你好！", "再见", temperature=0.5)),
        (chat("Be brief.", "x" * 1024 + "one"), chat("Be brief.", "x" * 1024 + "other")),
        ({"prompt": "长" * 1024 + "一"}, {"prompt": "长" * 1024 + "二"}),
        ({"prompt": [*range(256), 7]}, {"prompt": [*range(256), 8]}),
        ({"prompt": ["a", "b"]}, {"prompt": "a"}),
        ({"input": "hi", "instructions": "x"}, {"input": "hi", "instructions": "x", "previous_response_id": None}),
        (
            chat("s", "u", tools=[{"a": 1, "b": 2}]),
            chat("s", "u", tools=[{"b": 2, "a": 1}]),
        ),
    ],
)
def test_prompts_that_begin_alike_have_one_key(one, other):
    assert beginning_of(one) == beginning_of(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("你是翰林。", "你好"), chat("你是翰林。", "您好")),
        (chat("s", "u"), chat("t", "u")),
        ({"prompt": "a", "model": "x"}, {"prompt": "a", "model": "y"}),
        ({"prompt": "a", "cache_salt": "x"}, {"prompt": "a"}),
        ({"input": "a", "instructions": "x"}, {"input": "a", "instructions": "y"}),
        (
            {"messages": [{"role": "user", "content": "a"}], "system": "x"},
            {"messages": [{"role": "user", "content": "a"}]},
        ),
    ],
)
def test_prompts_that_begin_otherwise_have_another(one, other):
    assert beginning_of(one) != beginning_of(other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


@given(st.dictionaries(st.sampled_from(["messages", "prompt", "input", "model", "tools"]), JSON) | JSON)
def test_any_body_has_a_key_or_none(body):
    assert beginning_of(body) is None or len(beginning_of(body)) == 16


def test_a_body_without_a_prompt_or_too_deep_has_none():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for body in ({}, {"prompt": ""}, {"messages": []}, [], None, {"model": "m"}, {"messages": [{"content": deep}]}):
        assert beginning_of(body) is None


@given(NAMES, KEYS)
def test_a_replica_that_goes_takes_only_its_own_keys(names, key):
    home = home_of(key, dict.fromkeys(names, 0))
    for gone in names:
        rest = dict.fromkeys([name for name in names if name != gone], 0)
        if gone != home:
            assert home_of(key, rest) == home


def test_keys_spread_evenly():
    replicas = dict.fromkeys("abcd", 0)
    draw = Random(0)
    homes = Counter(home_of(draw.randbytes(16), replicas) for _ in range(4000))
    chi_square = sum((homes[name] - 1000) ** 2 / 1000 for name in replicas)
    assert chi_square < 16.27  # 0.1 % of draws with 3 degrees of freedom lie beyond


@given(NAMES, KEYS, st.data())
def test_the_rule_is_its_definition(names, key, data):
    loads = {name: data.draw(st.integers(0, 40)) for name in names}
    chosen = choose_replica(key, loads, Random(0))
    home = home_of(key, loads)
    mean = (sum(loads.values()) + 1) / len(loads)
    if loads[home] < max(SLACK, 1.25 * mean):
        assert chosen == home
    else:
        assert chosen != home
        others = sorted(loads[name] for name in names if name != home)
        assert len(others) == 1 or loads[chosen] < others[-1] or others[0] == others[-1] or others[-1] == others[-2]


@given(NAMES, KEYS)
def test_one_hot_key_never_piles_up(names, key):
    loads, draw = dict.fromkeys(names, 0), Random(1)
    for _ in range(100):
        chosen = choose_replica(key, loads, draw)
        assert loads[chosen] < capacity(loads) or chosen != home_of(key, loads)
        loads[chosen] += 1
    assert loads[home_of(key, loads)] <= max(SLACK, 1.25 * 101 / len(names) + 1)


def test_without_a_key_the_less_loaded_of_two_is_taken():
    draw = Random(0)
    assert {choose_replica(None, {"a": 3, "b": 2}, draw) for _ in range(50)} == {"b"}
    assert choose_replica(None, {"a": 99}, draw) == choose_replica(b"k", {"a": 99}, draw) == "a"
    seen = Counter(choose_replica(None, {"a": 0, "b": 1, "c": 2}, draw) for _ in range(300))
    assert seen["a"] > seen["b"] > 0 == seen["c"]
