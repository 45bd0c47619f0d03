"""Every layout of a run, and what one process of it does: the real `Trainer` over a tiny model, in fp64.

`HANLIN_STEPS=20 pytest tests/train/test_layouts.py` takes more steps than the four of the suite.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.train.tiny_training import TinySource

from hanlin.core.runs import Run
from hanlin.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import RouterConfig
from hanlin.parallel.settings import Layout
from hanlin.parallel.tracer import Tracer
from hanlin.train import CausalLM, Trainer, TrainSettings
from hanlin.train.objective import batch_loss

STEPS, ROWS, MICRO = int(os.environ.get("HANLIN_STEPS", "4")), 16, 2
SPARSE = ("moe", "mixed")

# name -> (processes, layout, kind of model, settings besides)
LAYOUTS: dict[str, tuple[int, dict[str, Any], str, dict[str, Any]]] = {
    "ddp": (4, {}, "dense", {}),
    "ddp-moe": (4, {}, "moe", {}),
    "zero1": (4, {"shard": "zero1"}, "dense", {}),
    "zero2": (4, {"shard": "zero2"}, "dense", {}),
    "zero3": (4, {"shard": "zero3"}, "dense", {}),
    "zero3-moe": (4, {"shard": "zero3"}, "moe", {}),
    "zero1-muon": (4, {"shard": "zero1"}, "dense", {"optimizer": {"kind": "muon"}}),
    "tp2": (2, {"tensor": 2}, "dense", {}),
    "tp2-moe": (2, {"tensor": 2}, "moe", {}),
    "tp2-muon": (2, {"tensor": 2}, "dense", {"optimizer": {"kind": "muon"}}),
    "tp4-sp": (4, {"tensor": 4, "sequence": True}, "dense", {}),
    "tp4-sp-moe": (4, {"tensor": 4, "sequence": True}, "moe", {}),
    "pp4-naive": (4, {"pipeline": 4, "schedule": "naive"}, "dense", {}),
    "pp4-gpipe": (4, {"pipeline": 4, "schedule": "gpipe"}, "dense", {}),
    "pp4-1f1b": (4, {"pipeline": 4}, "dense", {}),
    "pp4-1f1b-moe": (4, {"pipeline": 4}, "moe", {}),
    "pp4-1f1b-mixed": (4, {"pipeline": 4}, "mixed", {}),
    "pp4-1f1b-tied": (4, {"pipeline": 4}, "tied", {}),
    "pp4-interleaved": (4, {"pipeline": 4, "schedule": "interleaved"}, "dense", {}),
    "pp4-zero-bubble": (4, {"pipeline": 4, "schedule": "zero_bubble"}, "dense", {}),
    "cp2-ring": (2, {"context": 2}, "dense", {}),
    "cp4-ring": (4, {"context": 4}, "dense", {}),
    "cp2-ulysses": (2, {"context": 2, "context_kind": "ulysses"}, "dense", {}),
    "cp4-ulysses-moe": (4, {"context": 4, "context_kind": "ulysses"}, "moe", {}),
    "ep2": (2, {"expert": 2}, "moe", {}),
    "ep2-zero1": (4, {"expert": 2, "shard": "zero1"}, "moe", {}),
    "dp2-tp2-pp2": (8, {"tensor": 2, "pipeline": 2}, "dense", {}),
    "zero1-tp2-pp2": (8, {"tensor": 2, "pipeline": 2, "shard": "zero1"}, "tied", {}),
    "dp2-cp2-tp2": (8, {"tensor": 2, "context": 2, "shard": "zero2"}, "dense", {}),
}

# The smallest layouts that show a mistake, and what a layout of its own kind adds to the bytes.
SMALL: dict[str, tuple[int, dict[str, Any], str, dict[str, Any]]] = {
    "two": (2, {}, "dense", {}),
    "two-moe": (2, {}, "moe", {}),
    "two-zero1": (2, {"shard": "zero1"}, "dense", {}),
    "two-zero1-muon": (2, {"shard": "zero1"}, "dense", {"optimizer": {"kind": "muon"}}),
    "two-stages": (2, {"pipeline": 2}, "dense", {}),
    "two-stages-tied": (2, {"pipeline": 2}, "tied", {}),
    "two-sequence": (2, {"tensor": 2, "sequence": True}, "dense", {}),
    "zero2-tp2-muon-moe": (4, {"tensor": 2, "shard": "zero2"}, "moe", {"optimizer": {"kind": "muon"}}),
    "zero1-ep2-muon": (4, {"expert": 2, "shard": "zero1"}, "moe", {"optimizer": {"kind": "muon"}}),
}
CASES = LAYOUTS | SMALL


def layout_model(kind: str, dtype: torch.dtype = torch.float64) -> Transformer:
    """Eight layers, so that every rank of four has two stages; kind: dense, tied, moe, mixed (two are dense)."""
    torch.manual_seed(7)
    dense, sparse = FeedForwardConfig(48), kind in SPARSE
    config = ModelConfig.uniform(
        "qwen3_moe" if sparse else "qwen3",
        depth=8,
        attention=AttentionConfig(heads=4, kv_heads=4 if sparse else 2, head_dim=8, qk_norm=True),
        feed_forward=ExpertsConfig(4, 16, RouterConfig(2)) if sparse else dense,
        vocab_size=64,
        width=32,
        tied_embeddings=kind == "tied",
    )
    if kind == "mixed":
        first = replace(config.layers[0], feed_forward=dense)
        config = replace(config, layers=(first,) * 2 + config.layers[2:])
    model = Transformer(config).to(dtype)
    for parameter in model.parameters():  # a model at its initialisation hides a forgotten weight
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_trainer(
    name: str,
    run: Run | None,
    dtype: torch.dtype = torch.float64,
    *,
    layout: bool = True,
    steps: int = STEPS,
    trainer: type[Trainer] = Trainer,
) -> Trainer:
    """The case's trainer, of all processes of the group, or of this one alone (layout=False)."""
    _, axes, kind, rest = CASES[name]
    settings = {
        "steps": steps, "batch_size": ROWS, "micro_batch_size": MICRO, "precision": "fp32", "log_every": 1, "lr": 3e-3,
        "schedule": {"kind": "constant"}, "clip": 0.5, "eval_every": steps, "spikes": {},
        **rest,
    }  # fmt: skip
    if kind in SPARSE:
        settings |= {"balance": {"kind": "loss", "weight": 0.05}, "router_z_loss": 1e-3}
    return trainer(
        layout_model(kind, dtype), CausalLM(), TinySource(ROWS), TrainSettings.model_validate(settings),
        layout=Layout.model_validate(axes) if layout else None, run=run, evaluate=evaluate, quiet=True,
    )  # fmt: skip


def evaluate(model: Transformer, step: int) -> dict[str, float]:
    """On the same rows in every process."""
    batch = TinySource(4, seed=99).batch(0)
    return {"eval/loss": float(batch_loss(model, batch)) / CausalLM().count(batch)["tokens"]}


def train_case(
    name: str, folder: Path, dtype: torch.dtype = torch.float64, *, layout: bool = True, steps: int = STEPS
) -> None:
    """Train the case's model in `folder`, over all processes of the group (or alone: layout=False)."""
    trainer = make_trainer(name, Run(folder), dtype, layout=layout, steps=steps)
    with Tracer() as tracer:
        trainer.fit()
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"traced-{rank}.json").write_text(json.dumps(tracer.bytes()))


def work(rank: int, world: int, meeting: str, root: str, names: list[str], dtype: str, steps: int) -> None:
    """One process: every case of `names`, one after the other."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for name in names:
        folder = Path(root) / name
        if rank == 0:
            Run.open(folder)
        dist.barrier()
        try:
            train_case(name, folder, getattr(torch, dtype), steps=steps)
        except Exception as error:  # the others of this process go on; a hang is what the caller's timeout is for
            (folder / f"failed-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            raise
    dist.destroy_process_group()
