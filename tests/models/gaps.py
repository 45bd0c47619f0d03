"""How far ours is from a family's reference: the four numbers of the parity tests and of the table in the docs."""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tests.models.cases import Case, Inputs, inputs_of, redraw_all, reference_model
from tests.models.oracle import quiet
from tests.models.ours import gradients_as_theirs, load_ours, run_cached, run_ours
from tests.nn.lifting import lifted
from torch import nn

from hanlin.models import Transformer, save_model

TINY = 1e-9  # a gradient that is zero on both sides, but for rounding: a key's bias, which softmax cannot see


@torch.no_grad()
def forward_gap(case: Case, folder: Path, dtype: torch.dtype) -> float:
    """Largest |difference| of logits, and of hidden states where the case names them: their folder, loaded here."""
    theirs = reference_model(case).to(dtype)
    return _difference(case, load_ours(case, theirs, folder, dtype), theirs, inputs_of(case))


@torch.no_grad()
def reload_gap(case: Case, folder: Path) -> float:
    """The same of our redrawn weights, saved here and loaded by transformers, which must miss nothing and keep
    nothing."""
    import transformers

    ours = load_ours(case, reference_model(case), folder / "theirs")
    torch.manual_seed(8)
    redraw_all(ours)
    save_model(ours, folder / "ours")
    with quiet():
        kind = getattr(transformers, case.reload_class)
        theirs, report = kind.from_pretrained(folder / "ours", output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    return _difference(case, ours, theirs.eval(), inputs_of(case))


def gradient_gap(case: Case, folder: Path) -> float:
    """Largest relative L2 difference over the parameters that stand under one name on both sides (at least three)."""
    theirs = reference_model(case).double()
    ours = load_ours(case, theirs, folder, torch.float64)
    inputs = inputs_of(case)
    found = run_ours(case, ours, inputs)
    _backward(found.hidden if found.logits is None else found.logits)
    with lifted():
        reference = case.hidden if found.logits is None and case.hidden is not None else case.call
        numbers = reference(theirs, inputs)
    _backward(numbers)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    same = [(grad, expected[name]) for name, grad in gradients_as_theirs(ours).items() if name in expected]
    assert len(same) >= 3, f"{case.name}: too few parameters with one name on both sides"
    return max(float((ours_ - theirs_).norm() / (theirs_.norm() + TINY)) for ours_, theirs_ in same)


@torch.no_grad()
def cached_gap(case: Case, folder: Path) -> float:
    """Largest |difference| between the logits of the whole and of its pieces read through a cache."""
    ours = load_ours(case, reference_model(case), folder)
    inputs = inputs_of(case)
    whole, length = run_ours(case, ours, inputs).logits, inputs.ids.shape[1]
    assert whole is not None
    start, first = max(7, case.prompt), case.prompt
    middle = min(9, length - first - 1)
    cuts = ([start, *[1] * (length - start)], [first, middle, length - first - middle])
    return max(float((run_cached(case, ours, inputs, pieces) - whole).abs().max()) for pieces in cuts)


def _difference(case: Case, ours: Transformer, theirs: nn.Module, inputs: Inputs) -> float:
    found, gaps = run_ours(case, ours, inputs), []
    with lifted() if ours.dtype == torch.float64 else nullcontext():
        if found.logits is not None:
            gaps.append(found.logits - case.call(theirs, inputs))
        if case.hidden is not None:
            gaps.append(found.hidden - case.hidden(theirs, inputs))
    return max(float(gap.abs().max()) for gap in gaps)


def _backward(numbers: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(numbers.shape[-1], dtype=numbers.dtype, generator=generator)
    (F.log_softmax(numbers, -1) * weight).sum().backward()
