"""Our side of the parity tests: a reference's folder loaded here, asked for its numbers in the same words."""

from pathlib import Path
from typing import Any

import torch
from tests.engine.paging import Book
from tests.models.cases import Case, Inputs
from torch import Tensor, nn

from hanlin.models import Output, Transformer, load_model
from hanlin.models.families import find_family
from hanlin.nn.masks import Padding


def load_ours(case: Case, theirs: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The reference's folder, loaded here in `dtype`."""
    case.save(theirs, folder)
    ours = load_model(folder, dtype=dtype)
    assert ours.config.family == case.family
    return ours


def run_ours(case: Case, model: Transformer, inputs: Inputs, **more: Any) -> Output:
    how: dict[str, Any] = case.ours(inputs) | more
    if inputs.source is not None:
        mask = None if inputs.valid is None else Padding(inputs.valid.bool())
        how |= {"source": model.encode(inputs.source, mask=mask), "source_mask": mask}
    if inputs.segments is not None:
        how["segments"] = inputs.segments
    if model.lm_head is None:
        how["logits"] = None
    return model(inputs.ids, **how)


def run_cached(case: Case, model: Transformer, inputs: Inputs, cuts: list[int]) -> Tensor:
    """The logits of the same tokens, read in pieces through a cache."""
    rows, length = inputs.ids.shape
    cache = Book(model.config, sequences=rows, length=length, dtype=model.dtype)
    parts, start, whole = [], 0, case.ours(inputs)
    for count in cuts:
        piece = Inputs(inputs.ids[:, start : start + count], inputs.source, inputs.valid)
        how = whole | {k: v[..., start : start + count] for k, v in whole.items() if k == "positions"}
        parts.append(run_ours(case, model, piece, cache=cache.step(range(rows), count), **how).logits)
        start += count
    assert start == length
    return torch.cat(parts, 1)


def gradients_as_theirs(ours: Transformer) -> dict[str, Tensor]:
    """Their name -> our gradient in their layout. (The tables are linear, so gradients go through them as weights do,
    but for a tied head, which adds up on both sides.)"""
    held = dict(ours.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in held.items()}
    family = find_family(ours.config.family, "family")
    found: dict[str, Tensor] = {}
    for row in family.bind(ours.config, shapes):
        if all(held[name].grad is not None for name in row.ours):
            grads = [held[name].grad for name in row.ours]
            found |= zip(row.theirs, row.rule.to_theirs([g for g in grads if g is not None], ours.config), strict=True)
    return found
