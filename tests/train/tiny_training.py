"""A training small enough to be killed twenty times: a real model, a real source, the real Trainer."""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from hanlin.core.runs import Run
from hanlin.core.seeds import derive
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.train import CausalLM, Trainer, TrainResult, TrainSettings
from hanlin.train.checkpoint import newest_checkpoint

VOCABULARY, LENGTH = 61, 24


def tiny_model(*, tied: bool = False, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig.uniform(
        "llama",
        depth=2,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(48),
        vocab_size=VOCABULARY,
        width=32,
        tied_embeddings=tied,
    )
    model = Transformer(config)
    for parameter in model.parameters():  # a model at its initialisation hides a forgotten weight
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


class TinySource:
    """Rows of one to three documents of random lengths, padded, and one in four without any trained token at all, so
    that micro-batches hold unequal numbers of targets. Row r of step s depends on (seed, s, r) alone."""

    def __init__(self, rows: int, *, seed: int = 0, steps_per_epoch: int = 0) -> None:
        self.rows_per_step, self.seed, self.steps_per_epoch = rows, seed, steps_per_epoch

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        numbers = range(start, self.rows_per_step if stop is None else stop)
        ids = torch.zeros(len(numbers), LENGTH, dtype=torch.int64)
        documents = torch.full_like(ids, -1)
        for place, number in enumerate(numbers):
            generator = torch.Generator().manual_seed(derive(self.seed, step, number) % 2**62)
            count = int(torch.randint(1, 4, (), generator=generator))
            pieces = torch.randint(1, LENGTH // 3 + 1, (count,), generator=generator)
            if number % 4 == 3:
                pieces = torch.ones_like(pieces)
            ends = pieces.cumsum(0).tolist()
            for document, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                documents[place, begin:end] = document
            ids[place] = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        names = tuple((f"book-{step}-{number}",) for number in numbers)
        return Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents, names)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "tiny", "seed": self.seed, "rows": self.rows_per_step}


def evaluate(model: Transformer, step: int) -> dict[str, float]:
    """Draws chance, as sampling during training does: a resumed run must draw the same."""
    batch = TinySource(4, seed=99).batch(int(torch.randint(0, 1000, ())))
    terms, _ = CausalLM().loss(model, batch)
    return {"eval/loss": float(terms[0][0]) / CausalLM().count(batch)["tokens"]}


def train(folder: str | Path | None, settings: dict[str, Any], *, seed: int = 0, **rest: Any) -> TrainResult:
    """Train the tiny model in the run `folder`; `settings` over small defaults."""
    chosen = TrainSettings.model_validate(
        {"batch_size": 8, "precision": "fp32", "log_every": 3, "lr": 1e-2, **settings}
    )
    run = Run.open(folder) if folder is not None else None
    rest.setdefault("evaluate", evaluate if chosen.eval_every else None)
    rest.setdefault("data", TinySource(chosen.batch_size))
    rest.setdefault("model", tiny_model())
    rest.setdefault("objective", CausalLM())
    model, objective, data = rest.pop("model"), rest.pop("objective"), rest.pop("data")
    return Trainer(model, objective, data, chosen, run=run, seed=seed, quiet=True, **rest).fit()


def in_this_process(folder: str, settings: dict[str, Any]) -> None:
    """For a process of its own: one thread, then `train`."""
    torch.set_num_threads(1)
    train(folder, settings)


def as_one_of(rank: int, world: int, meeting: str, folder: str, settings: dict[str, Any]) -> None:
    """One of `world` processes that train in fp64 together over gloo; `meeting` is a file to find each other by."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    train(folder, settings, model=tiny_model(seed=rank).double())  # rank 0's weights count
    torch.distributed.destroy_process_group()


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint of a run."""
    checkpoint = newest_checkpoint(Run.open(folder), pytest.fail)
    assert checkpoint is not None
    return checkpoint.model


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def in_own_process(target: Any, *arguments: Any) -> BaseProcess:
    """Start `target` in a process forked from a server that has torch loaded already: 0.3 s instead of 5."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hanlin.train.trainer"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process
