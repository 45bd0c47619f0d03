"""Every family equals its reference: logits, hidden states, gradients, cached decoding, and the way back.

The same numbers as a table: `python -m tests.models.parity_table`.
"""

import pytest
import torch
from tests.models.cases import Case, all_cases, reference_model
from tests.models.gaps import cached_gap, forward_gap, gradient_gap, reload_gap
from tests.models.ours import load_ours

from hanlin.models import load_model, save_model
from hanlin.models.families import FAMILIES

FP32, FP64, CACHED, GRADIENT = 5e-5, 1e-9, 2e-5, 1e-4
CASES = {case.name: case for case in all_cases()}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_no_family_is_without_a_case():
    assert set(FAMILIES) == {case.family for case in CASES.values()}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FP32), (torch.float64, FP64)], ids=["fp32", "fp64"])
def test_their_folder_gives_their_numbers_here(case, dtype, bound, tmp_path):
    assert forward_gap(case, tmp_path, dtype) <= bound


def test_gradients_are_theirs(case, tmp_path):
    assert gradient_gap(case, tmp_path) <= GRADIENT


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reload])
def test_our_folder_gives_our_numbers_there(name, tmp_path):
    assert reload_gap(CASES[name], tmp_path) <= FP32


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cached])
def test_cached_decoding_is_the_whole_pass(name, tmp_path):
    assert cached_gap(CASES[name], tmp_path) <= CACHED


def test_saved_and_loaded_is_the_same_to_the_bit(case, tmp_path):
    ours = load_ours(case, reference_model(case), tmp_path / "a")
    save_model(ours, tmp_path / "b")
    again = load_model(tmp_path / "b")
    assert again.config == ours.config
    for (name, a), (other, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
