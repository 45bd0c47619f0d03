"""A tiny random model as a folder, and a real server around engines: real HTTP on a free port."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from hanlin.engine import Engine
from hanlin.models import load_model, save_model
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.serve.app import create_app
from hanlin.serve.prompting import template_ids
from hanlin.serve.run import address_of, bind
from hanlin.tokens import Tokenizer

Scene = tuple[list[dict[str, Any]], list[dict[str, Any]], str]  # messages, tools, what the assistant says

TEXT = """The quick brown fox jumps over the lazy dog, and the dog does not mind. def add(a, b): return a + b
Reading and writing are two sides of one coin. What does json.dumps do? It writes an object as JSON.
敏捷的棕色狐狸跳过了懒狗，狗并不在意。读和写是一枚硬币的两面。翰林院是古代读书人向往的地方。
"""


def make_folder(folder: Path, *, context: int = 4096, seed: int = 0) -> Path:
    """Random weights with lively logits, a tokenizer that splits rare Chinese characters into bytes."""
    text = folder.with_suffix(".txt")
    text.write_text(TEXT * 4, encoding="utf-8")
    tokenizer = Tokenizer.train([text], vocab_size=420)
    attention = AttentionConfig(heads=2, kv_heads=1, head_dim=16, qk_norm=True)
    config = ModelConfig.uniform(
        "qwen3",
        depth=2,
        attention=attention,
        feed_forward=FeedForwardConfig(64),
        vocab_size=tokenizer.size,
        width=32,
        max_positions=context,
        tied_embeddings=True,
        init_std=0.3,
    )
    torch.manual_seed(seed)
    save_model(Transformer(config), folder)
    tokenizer.save(folder)
    return folder


def make_parrot(folder: Path, sentence: str) -> Path:
    """A model that has learnt one sentence and its end by heart."""
    tokenizer = Tokenizer.load(make_folder(folder))
    return teach(folder, [([], [*tokenizer.encode(sentence), tokenizer.eos_id])])


def make_actor(
    folder: Path, scenes: Sequence[Scene], *, template: str | None = None, spellings: Mapping[str, str] | None = None
) -> Path:
    """A model that knows its lines: what the assistant says in each of these conversations.

    spellings: new names of the tokenizer's reserved tokens.
    """
    make_folder(folder)
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        for old, new in (spellings or {}).items():
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    end = tokenizer.stop_ids[-1]
    lines = [(template_ids(tokenizer, t, tools), [*tokenizer.encode(a, special=True), end]) for t, tools, a in scenes]
    return teach(folder, lines)


def teach(folder: Path, lines: Sequence[tuple[list[int], list[int]]]) -> Path:
    """Train the model of a folder until it continues each first part with the second, and save it there."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    longest = max(len(before) + len(after) for before, after in lines)
    ids = torch.full((len(lines), longest), tokenizer.eos_id)
    targets = torch.full((len(lines), longest), -100)
    for row, (before, after) in enumerate(lines):
        ids[row, : len(before) + len(after)] = torch.tensor([*before, *after])
        targets[row, len(before) : len(before) + len(after)] = torch.tensor(after)
    if not lines[0][0]:
        targets[:, 0] = -100
    for _ in range(1500):
        logits = model.train()(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taught = targets[:, 1:] >= 0
        sure = logits.detach().softmax(-1).gather(-1, targets[:, 1:].clamp(0)[..., None])[..., 0][taught].min()
        if float(sure) > 0.9:
            break
    else:
        raise AssertionError(f"it has not learnt its lines: one token has a probability of {float(sure):.3f}")
    save_model(model, folder)
    return folder


@contextlib.contextmanager
def serving(engines: Mapping[str, Engine], **options) -> Iterator[str]:
    """The address of a server in a thread of this process; options: those of `create_app`."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(engines, **options), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive()


def wait_until(holds, seconds: float = 20.0) -> None:
    """Poll until a condition holds; fail after a while."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)


def post(address: str, path: str, body: dict, **more) -> httpx.Response:
    return httpx.post(address + path, json=body, timeout=60, **more)
