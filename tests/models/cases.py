"""Every family as cases: a random tiny reference model with every parameter redrawn, and how to ask it for its numbers.

The reference is transformers where it has the family, else an independent twin written for the test. A group of
families has a file of cases (`cases_decoders.py` …) with a list `CASES`; `all_cases` gathers them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from tests.models.oracle import quiet, save_theirs
from torch import Tensor, nn

NAMES = ("llama", "decoders", "classic", "chinese", "experts", "encoders", "seq2seq")
GROUPS = tuple(f"cases_{name}" for name in NAMES)


@dataclass(frozen=True)
class Inputs:
    """ids (rows, T); source (rows, S) and valid (rows, S) for encoder-decoder models; segments (rows, T) for BERT's
    kind."""

    ids: Tensor
    source: Tensor | None = None
    valid: Tensor | None = None
    segments: Tensor | None = None


def call_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits of a transformers model."""
    how: dict[str, Any] = {"input_ids": inputs.ids}
    if inputs.source is not None:
        how = {"input_ids": inputs.source, "attention_mask": inputs.valid, "decoder_input_ids": inputs.ids}
    if inputs.segments is not None:
        how["token_type_ids"] = inputs.segments
    return model(**how).logits


@dataclass(frozen=True)
class Case:
    """name: unique; family: the `model_type`; build: a random tiny reference in fp32, fixed seed set by the caller.

    reference: what it is, for the table in the docs. call: its logits; hidden: its last hidden states (encoders). save:
    writes a model folder. reload: whether transformers can load what we save (a class exists). cached: whether text is
    written token by token, after `prompt` of them in one piece. ours: more arguments for our forward pass, made from
    the inputs. std: logits are wide enough.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    kind: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"
    reference: str = "transformers"
    call: Callable[[nn.Module, Inputs], Tensor] = call_logits
    hidden: Callable[[nn.Module, Inputs], Tensor] | None = None
    save: Callable[[Any, Path], Any] = save_theirs
    reload: bool = True
    reload_class: str = "AutoModelForCausalLM"
    cached: bool = True
    ours: Callable[[Inputs], dict[str, Any]] = field(default=lambda inputs: {})
    length: int = 21
    vocabulary: int = 131
    prompt: int = 1


def reference_model(case: Case, *, seed: int = 0) -> nn.Module:
    """The reference in evaluation mode, redrawn, its logits at least 0.5 wide."""
    torch.manual_seed(seed)
    with quiet():
        model = case.build().eval()
    redraw_all(model)
    with torch.no_grad():
        assert case.call(model, inputs_of(case)).std() >= 0.5, f"{case.name}: logits too narrow to prove anything"
    return model


@torch.no_grad()
def redraw_all(model: nn.Module) -> None:
    """Norms 1 ± 0.1, biases and corrections N(0, 0.1), matrices N(0, 1 / fan-in): nothing forgotten stays unseen."""
    seen: set[int] = set()
    for name, parameter in [*model.named_parameters(), *_saved_buffers(model)]:
        if id(parameter) in seen or not parameter.is_floating_point():
            continue
        seen.add(id(parameter))
        last = name.rsplit(".", 1)[-1]
        if parameter.dim() == 1 and last == "weight":
            parameter.normal_(1.0, 0.1)
        elif parameter.dim() == 1:
            parameter.normal_(0.0, 0.1)
        else:
            parameter.normal_(0.0, max(parameter.shape[-1], 16) ** -0.5)


def _saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    held = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in held]


def inputs_of(case: Case, *, rows: int = 3, length: int | None = None, seed: int = 5) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def ids(columns: int) -> Tensor:
        return torch.randint(3, case.vocabulary, (rows, columns), generator=generator)  # 0 … 2: padding and its kin

    length = length or case.length
    if case.kind == "encoder-decoder":
        valid = torch.ones(rows, 17, dtype=torch.int64)
        valid[1, 11:] = 0  # a shorter source
        return Inputs(ids(length), ids(17), valid)
    return Inputs(ids(length))


def all_cases() -> list[Case]:
    found: list[Case] = []
    for group in GROUPS:
        try:
            module = import_module(f"tests.models.{group}")
        except ModuleNotFoundError as error:
            if error.name != f"tests.models.{group}":
                raise
            continue
        found += module.CASES
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two cases of one name"
    return found
