"""A tiny random model as a folder, and a real server around engines: real HTTP on a free port."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import torch
import uvicorn

from hanlin.engine import Engine
from hanlin.models import load_model, save_model
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.serve.app import create_app
from hanlin.serve.run import address_of, bind
from hanlin.tokens import Tokenizer

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
    make_folder(folder)
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    ids = torch.tensor([[*tokenizer.encode(sentence), tokenizer.eos_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        logits = model.train()(ids[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.02:
            break
    save_model(model, folder)
    return folder


@contextlib.contextmanager
def serving(engines: Mapping[str, Engine], *, api_key: str | None = None) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(engines, api_key=api_key), log_level="warning"))
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
