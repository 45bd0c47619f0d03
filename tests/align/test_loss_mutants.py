"""The checks can fail: each plausible mistake of `mutants_losses` breaks the one that is named beside it."""

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.align import test_golden, test_policy_loss, test_preference_loss, test_reward_loss
from tests.align.mutants_losses import ADVANTAGES, LOSS, MUTANTS, PREFERENCE, REWARD, SUMS
from tests.rl import test_advantages

TESTS = (test_golden, test_policy_loss, test_preference_loss, test_reward_loss, test_advantages)
USERS = (*TESTS, *map(importlib.import_module, (SUMS, LOSS, PREFERENCE, REWARD, ADVANTAGES)))


@contextlib.contextmanager
def mutated(module: str, before: str, after: str) -> Iterator[None]:
    """Everyone who uses the module uses one with another text in place of what stands there exactly once."""
    original = importlib.import_module(module)
    source = inspect.getsource(original)
    assert source.count(before) == 1, f"{before!r} stands {source.count(before)} times in {module}"
    changed = types.ModuleType(module)
    own = {value: name for name, value in vars(original).items() if inspect.isfunction(value)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, changed)  # a dataclass looks its module up there
        exec(compile(source.replace(before, after), module, "exec"), vars(changed))
        for user in USERS:
            for name, value in list(vars(user).items()):
                if inspect.isfunction(value) and value.__module__ == module:
                    patch.setattr(user, name, getattr(changed, own[value]))
        yield


def checks(name: str) -> list[Callable[[], None]]:
    """A golden case with every library that has it, or a test with every combination of its parameters."""
    if name in test_golden.OURS:
        libraries = [library for library, case in test_golden.CASES if case == name]
        return [lambda at=library: test_golden.test_equals_the_library(at, name) for library in libraries]
    found = [getattr(module, name) for module in TESTS if hasattr(module, name)]
    assert found, f"there is no check {name}"
    return [lambda test=test, values=values: test(**values) for test in found for values in combinations_of(test)]


def combinations_of(test: Callable[..., None]) -> list[dict]:
    rows: list[dict] = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, given = mark.args
            names = [names] if isinstance(names, str) else list(names)
            values = [dict(zip(names, [v] if len(names) == 1 else v, strict=True)) for v in given]
            rows = [row | value for row in rows for value in values]
    return rows


def fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, RuntimeError, ZeroDivisionError):
        return True
    return False


@pytest.mark.parametrize(("module", "before", "after", "check"), MUTANTS)
def test_the_mistake_is_seen(module: str, before: str, after: str, check: str) -> None:
    torch.manual_seed(0)
    with mutated(module, before, after):
        assert any(fails(one) for one in checks(check)), f"{check} does not see {before!r} -> {after!r}"


def test_without_a_mistake_the_checks_hold() -> None:
    """The machinery alone breaks nothing: a module that is executed anew is as good as the first."""
    for module in (SUMS, LOSS, PREFERENCE, REWARD, ADVANTAGES):
        nothing = "from torch import Tensor\n"
        with mutated(module, nothing, nothing):
            for name in {check for where, _, _, check in MUTANTS if where == module}:
                for one in checks(name):
                    one()
