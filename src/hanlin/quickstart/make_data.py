"""The first four stages: text, instruction data, tokenizer, token shards."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hanlin.core.files import write_text
from hanlin.data.build import build
from hanlin.data.recipe import DataRecipe
from hanlin.data.sources import TextSource
from hanlin.quickstart.corpus import (
    build_corpus,
    code_fingerprint,
    collect_documents,
    corpus_fingerprint,
    read_documents,
)
from hanlin.quickstart.facts import NAMES
from hanlin.quickstart.identity import Identity
from hanlin.quickstart.instructions import Example, make_instructions
from hanlin.quickstart.own_text import own_documents, own_files, own_fingerprint
from hanlin.quickstart.recipe import QuickstartRecipe
from hanlin.quickstart.stage import Done, run_stage
from hanlin.tokens import Tokenizer


def text_stage(recipe: QuickstartRecipe, *, quiet: bool) -> Done:
    """`train.jsonl` and `heldout.jsonl`: one document a line."""
    files = own_files(recipe.text)
    inputs: dict[str, Any] = {"held_out": recipe.held_out, "documentation": corpus_fingerprint()}
    if files:
        inputs["documentation"] = code_fingerprint("walk", "clean", "corpus", "own_text")
        inputs["files"] = own_fingerprint(files)

    def work(folder: Path) -> dict[str, Any]:
        documents = own_documents(files) if files else collect_documents(quiet=quiet)
        return build_corpus(folder, documents, kept=() if files else NAMES, share=recipe.held_out)

    return run_stage(recipe.out, "1-text", inputs, work, quiet=quiet)


def instruction_stage(recipe: QuickstartRecipe, text: Done, *, quiet: bool) -> Done:
    """`instructions.jsonl` (OpenAI messages) to train on, `evaluation.jsonl` to be asked."""
    identity = identity_for(recipe)
    inputs = {
        "text": text.fingerprint,
        "settings": recipe.instructions.model_dump(mode="json"),
        "seed": recipe.seed,
        "identity": asdict(identity),
        "code": code_fingerprint("facts", "identity", "instructions", "questions", "sums", "unknowable"),
    }

    def work(folder: Path) -> dict[str, Any]:
        documents = read_documents(text.folder / "train.jsonl")
        made = make_instructions(documents, recipe.instructions, identity, seed=recipe.seed, own_text=bool(recipe.text))
        write_text(folder / "instructions.jsonl", _lines(made.conversations))
        write_text(folder / "evaluation.jsonl", _lines(map(asdict, made.evaluation)))
        return {"conversations": len(made.conversations), "counts": made.counts, "evaluated": len(made.evaluation)}

    return run_stage(recipe.out, "2-instructions", inputs, work, quiet=quiet)


def tokenizer_stage(recipe: QuickstartRecipe, text: Done, instructions: Done, *, quiet: bool) -> Done:
    """A tokenizer that has counted the instructions too: without them Chinese would fall apart into bytes."""
    inputs = {"text": text.fingerprint, "instructions": instructions.fingerprint, "vocab_size": recipe.vocab_size}

    def work(folder: Path) -> dict[str, Any]:
        files = [text.folder / "train.jsonl", instructions.folder / "instructions.jsonl"]
        tokenizer = Tokenizer.train(files, vocab_size=recipe.vocab_size, quiet=quiet)
        tokenizer.save(folder)
        return {"size": tokenizer.size}

    return run_stage(recipe.out, "3-tokenizer", inputs, work, quiet=quiet)


def shard_stage(recipe: QuickstartRecipe, text: Done, tokenizer: Done, *, quiet: bool) -> Done:
    """`train/` and `heldout/`: the text as memory-mapped tokens."""
    inputs = {"text": text.fingerprint, "tokenizer": tokenizer.fingerprint}

    def work(folder: Path) -> dict[str, Any]:
        result = {}
        for name in ("train", "heldout"):
            source = TextSource(paths=[text.folder / f"{name}.jsonl"])
            data = DataRecipe(out=folder / name, tokenizer=tokenizer.folder, sources=[source])
            shards = build(data, quiet=quiet)
            result[f"{name}_tokens"] = shards.tokens
        return result

    return run_stage(recipe.out, "4-shards", inputs, work, quiet=quiet)


def read_evaluation(instructions: Done) -> list[Example]:
    """The evaluation questions that `instruction_stage` wrote."""
    with (instructions.folder / "evaluation.jsonl").open(encoding="utf-8") as stream:
        return [Example(**json.loads(line)) for line in stream]


def identity_for(recipe: QuickstartRecipe) -> Identity:
    """What the model says it was trained on: Python documentation, or the names of the user's files."""
    if not recipe.text:
        return Identity()
    names = ", ".join(path.name for path in recipe.text[:2]) + (", ..." if len(recipe.text) > 2 else "")
    return Identity(f"the text of {names}", f"{names} 的文本")


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
