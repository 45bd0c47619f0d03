"""The work of `bench_align.py`: one tokenizer, one random Llama (~30M) and the same texts, in files for both sides.

The model ends its answers in a way that can be foreseen. Coordinate 0 of every token's vector is the same positive
number and that of the end token a greater one, chosen so that at each place the answer ends with probability 1 in 32:
lengths are geometric, mean about 26 where they are cut at 64. (The branches of the layers are damped, so that what
they add to the stream leaves this as it is; the work is that of any Llama of this shape.) For fixed lengths the end is
ignored.
"""

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY, WIDTH, LAYERS, HIDDEN, HEADS, POSITIONS = 8192, 512, 8, 1408, 8, 1024
ROW = 256  # tokens of a conversation, and of a prompt with one answer, at most
ANSWER = 64  # tokens of a GRPO answer at most
ENDS = 1 / 32  # probability of the end token at each place
ROWS = {"sft": 1024, "dpo": 1024, "grpo": 512}


def prepare(folder: Path) -> None:
    """model/ and a file of rows for each task, unless they are there."""
    if (folder / "grpo.jsonl").exists():
        return
    import torch

    from hanlin.align.build import save_model_folder, with_token_ids
    from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer
    from hanlin.tokens import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    text = installed_text()
    tokenizer = Tokenizer.train_from_iterator(text.splitlines(keepends=True), vocab_size=VOCABULARY)
    words = text.split()
    chance = random.Random(0)
    write_rows(folder / "sft.jsonl", (conversation(words, chance) for _ in range(ROWS["sft"])))
    write_rows(folder / "dpo.jsonl", (pair(words, chance) for _ in range(ROWS["dpo"])))
    config = ModelConfig.uniform(
        "llama", depth=LAYERS, attention=AttentionConfig(HEADS, HEADS, WIDTH // HEADS),
        feed_forward=FeedForwardConfig(HIDDEN), vocab_size=VOCABULARY, width=WIDTH, max_positions=POSITIONS,
        tied_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(with_token_ids(config, tokenizer))
    prompts = [" ".join(words[(at := chance.randrange(len(words) - 40)) : at + 20]) for _ in range(ROWS["grpo"])]
    favour_end(model, tokenizer.eos_id, [tokenizer.prompt(prompt) for prompt in prompts[:64]])
    save_model_folder(model, tokenizer, folder / "model")
    write_rows(folder / "grpo.jsonl", ({"prompt": prompt} for prompt in prompts))


def installed_text() -> str:
    """English prose and Python that every interpreter brings along."""
    import argparse
    import inspect
    import pydoc_data.topics
    import tarfile
    import typing

    modules = (argparse, inspect, tarfile, typing)
    sources = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules]
    return "\n".join([*pydoc_data.topics.topics.values(), *sources])


def conversation(words: list[str], chance: random.Random) -> dict[str, Any]:
    """A request and an answer of different lengths: about 60 to 250 tokens together."""
    return {
        "messages": [
            {"role": "user", "content": passage(words, chance, 8, 30)},
            {"role": "assistant", "content": passage(words, chance, 20, 75)},
        ]
    }


def pair(words: list[str], chance: random.Random) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": passage(words, chance, 10, 30)}],
        "chosen": [{"role": "assistant", "content": passage(words, chance, 20, 60)}],
        "rejected": [{"role": "assistant", "content": passage(words, chance, 20, 60)}],
    }


def passage(words: list[str], chance: random.Random, least: int, most: int) -> str:
    """So many words in a row from a random place of the text."""
    count = chance.randint(least, most)
    at = chance.randrange(len(words) - count)
    return " ".join(words[at : at + count])


def favour_end(model: Any, end: int, prompts: list[list[int]]) -> None:
    """Set the end token's vector so that its mean probability after the prompts is `ENDS`."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.02)
        table = model.model.embed_tokens.weight
        table[:, 0] = 0.2
        hidden = torch.cat([model(torch.tensor([ids]), logits=None).hidden.flatten(0, -2)[-1:] for ids in prompts])
        logits = hidden @ table.T
        logits[:, end] = -math.inf
        others = logits.logsumexp(1)
        rest = hidden[:, 1:] @ table[end, 1:]
        low, high = 0.0, 5.0
        for _ in range(50):
            middle = (low + high) / 2
            ends = (hidden[:, 0] * middle + rest - others).sigmoid().mean()
            low, high = (low, middle) if ends > ENDS else (middle, high)
        table[end, 0] = low


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def worth(text: str) -> float:
    """The reward of both sides: something that differs from answer to answer."""
    return len(set(text)) % 7


def reward(samples: Any) -> list[float]:
    """`worth` as Hanlin calls a reward."""
    return [worth(sample.text) for sample in samples]
