"""The parity of every family as a Markdown table: `python -m tests.models.parity_table > docs/parity.md`."""

import tempfile
from pathlib import Path

import torch
from tests.models.cases import all_cases
from tests.models.gaps import cached_gap, forward_gap, gradient_gap, reload_gap

INTRO = """# Parity: every family beside its reference

Random tiny models with every parameter redrawn (norms 1 ± 0.1, biases N(0, 0.1), matrices N(0, 1/fan-in)), the same
folder loaded by the reference and by Hanlin. Largest absolute difference of the logits (encoders: of the hidden states
too), the largest relative difference of a gradient in fp64, cached decoding against the whole pass, and our weights
loaded by transformers ("back"; a dash where it has no class, or where nothing is decoded). Made by
`python -m tests.models.parity_table`, checked by `tests/models/test_families.py` (bounds 5e-5, 1e-9, 1e-4, 2e-5, 5e-5).

| case | family | reference | fp32 | fp64 | gradients | cached | back |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    print(INTRO)
    for case in all_cases():
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            numbers = [
                forward_gap(case, place / "a", torch.float32),
                forward_gap(case, place / "b", torch.float64),
                gradient_gap(case, place / "c"),
                cached_gap(case, place / "d") if case.cached else None,
                reload_gap(case, place / "e") if case.reload else None,
            ]
        cells = ["–" if n is None else f"{n:.0e}" for n in numbers]
        print(f"| {case.name} | {case.family} | {case.reference} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
