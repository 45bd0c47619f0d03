"""A proof must be able to fail: each plausible mistake in a family breaks its parity by far more than the bound."""

from importlib import import_module

import pytest
import torch
from tests.models.cases import GROUPS, all_cases, inputs_of, reference_model
from tests.models.ours import load_ours, run_ours

CASES = {case.name: case for case in all_cases()}


def _all_mutants() -> dict:
    found: dict = {}
    for group in GROUPS:
        try:
            module = import_module(f"tests.models.{group.replace('cases', 'mutants')}")
        except ModuleNotFoundError:
            continue
        assert not found.keys() & module.MUTANTS.keys()
        found |= module.MUTANTS
    return found


MUTANTS = _all_mutants()


@torch.no_grad()
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_parity_check_fails_for(mutant, tmp_path):
    name, mutate = MUTANTS[mutant]
    case = CASES[name]
    theirs, inputs = reference_model(case), inputs_of(case)
    ours = load_ours(case, theirs, tmp_path)
    mutate(ours)
    found = run_ours(case, ours, inputs)
    gaps = []
    if found.logits is not None:
        gaps.append((found.logits - case.call(theirs, inputs)).abs().max())
    if case.hidden is not None:
        gaps.append((found.hidden - case.hidden(theirs, inputs)).abs().max())
    assert max(gaps) > 1e-4
