"""A tiny model, prompts and recipes for tests of on-policy methods."""

import json
from pathlib import Path

from hanlin.align.build import save_model_folder, with_token_ids
from hanlin.align.on_policy_recipe import FunctionReward, OnPolicyObjective
from hanlin.align.recipe import NewModel, SavedModel, TrainChoices, TrainRecipe
from hanlin.align.samples import Sample
from hanlin.core.seeds import seed_everything
from hanlin.models import Transformer
from hanlin.tokens import Tokenizer

SMALL = NewModel(depth=2, width=32, heads=2, kv_heads=1, hidden=64, max_positions=128)
REWARD = "tests.align.on_policy_cases:digits"


def digits(samples: list[Sample]) -> list[float]:
    """How many of an answer's tokens are below 200: something that chance varies and training can move."""
    return [sum(token < 200 for token in sample.ids) / len(sample.ids) for sample in samples]


def model_folder(folder: Path, tokenizer: Tokenizer, *, positions: int = 128) -> Path:
    """A random model beside its tokenizer."""
    from hanlin.align.build import new_config

    seed_everything(3)
    size = SMALL.model_copy(update={"max_positions": positions})
    model = Transformer(with_token_ids(new_config(size, tokenizer, positions), tokenizer))
    save_model_folder(model, tokenizer, folder)
    return folder


def prompt_file(file: Path, count: int = 10) -> Path:
    rows = [{"prompt": f"{i} + {i}? 二加{i}", "answer": str(2 * i)} for i in range(count)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def rl_recipe(model: Path, prompts: Path, runs: Path, *, name: str = "rl", train=None, **objective) -> TrainRecipe:
    """Rounds of 2 prompts with 3 answers of at most 5 tokens."""
    chosen = {
        "kind": "grpo", "prompts": [prompts], "rewards": [FunctionReward(function=REWARD)], "prompts_a_round": 2,
        "answers": 3, "max_tokens": 5, "plain": True, "seq_len": 48,
    } | objective  # fmt: skip
    settings = {"steps": 4, "lr": 1e-2, "precision": "fp32", "device": "cpu", "log_every": 1} | (train or {})
    return TrainRecipe(
        name=name, runs=runs, model=SavedModel(path=model), objective=OnPolicyObjective(**chosen),
        train=TrainChoices(**settings),
    )  # fmt: skip


def halves(samples: list[Sample]) -> list[list[float]]:
    """A reward for each half of an answer."""
    out = []
    for sample in samples:
        middle = max(1, len(sample.ids) // 2)
        parts = (list(sample.ids[:middle]), list(sample.ids[middle:]))
        out.append([sum(token < 200 for token in part) / max(len(part), 1) for part in parts])
    return out
