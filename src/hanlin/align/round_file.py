"""`Round`: answers with everything that is learnt from them, and the file that keeps one across a restart.

A round of several optimizer steps was written with weights that no longer exist when a checkpoint in its middle is
read; so it is kept as it was: one safetensors file, the numbers as tensors, the rest as JSON in its header."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hanlin.align.samples import Prompt, Sample
from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path

Numbers = dict[str, list[list[float]]]  # of tokens: by name, for each answer, one a written token


@dataclass(frozen=True)
class Round:
    """Answers that are to be learnt from, with numbers about each (`numbers`) and about its written tokens (`tokens`);
    notes: what is logged of them, (sum, count) by name."""

    samples: list[Sample]
    numbers: dict[str, list[float]]
    tokens: Numbers
    notes: dict[str, tuple[float, float]]


def write_round(file: Path, made: Round) -> None:
    """Write it, whole or not at all."""
    about = [
        {
            "prompt": s.prompt.number, "ids": list(s.ids), "text": s.text, "written": [int(w) for w in s.written],
            "finish": s.finish, "group": s.group, "version": s.version, "notes": dict(s.notes),
        }
        for s in made.samples
    ]  # fmt: skip
    tensors = {f"numbers/{name}": torch.tensor(values, dtype=torch.float64) for name, values in made.numbers.items()}
    tables = {**made.tokens, "logp of all": [list(s.logp) for s in made.samples]}
    for name, rows in tables.items():
        tensors[f"tokens/{name}"] = torch.tensor([v for row in rows for v in row], dtype=torch.float64)
        tensors[f"lengths/{name}"] = torch.tensor([len(row) for row in rows])
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"samples": json.dumps(about), "notes": json.dumps(made.notes)})


def read_round(file: Path, prompts: Sequence[Prompt]) -> Round:
    """What `write_round` wrote; `prompts` of the same files."""
    by_number = {prompt.number: prompt for prompt in prompts}
    try:
        with safe_open(file, framework="pt") as stream:
            header = stream.metadata()
            tensors = {name: stream.get_tensor(name) for name in list(stream.keys())}
        about, notes = json.loads(header["samples"]), json.loads(header["notes"])
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise HanlinError(
            f"{file} is not a whole round of answers ({error}); continue from an earlier checkpoint."
        ) from error
    tokens: Numbers = {}
    for name in [key.removeprefix("tokens/") for key in tensors if key.startswith("tokens/")]:
        flat, lengths = tensors[f"tokens/{name}"], tensors[f"lengths/{name}"].tolist()
        tokens[name] = [part.tolist() for part in flat.split(lengths)]
    logp = tokens.pop("logp of all")
    samples = [
        Sample(
            by_number[row["prompt"]], row["ids"], row["text"], own, [bool(w) for w in row["written"]], row["finish"],
            row["group"], row["version"], row["notes"],
        )
        for row, own in zip(about, logp, strict=True)
    ]  # fmt: skip
    numbers = {key.removeprefix("numbers/"): t.tolist() for key, t in tensors.items() if key.startswith("numbers/")}
    return Round(samples, numbers, tokens, {name: (pair[0], pair[1]) for name, pair in notes.items()})
