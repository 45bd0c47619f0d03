"""One optimizer step of the real `Trainer` under the tracer, in every layout: what each rank sent, and what the planner
says of the same rank.

Traced is what belongs to a step: totals, forward and backward, norm, balance, update. Setting up, logging, evaluation
and checkpoints are outside.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.train.layout_cases import CASES, layout_model, make_trainer
from tests.train.tiny_training import LENGTH, in_own_process

from hanlin.nn.losses import count_targets
from hanlin.nn.routing import Router, Routing
from hanlin.parallel.settings import Layout
from hanlin.parallel.tracer import Call, Tracer
from hanlin.plan.communication import Sent, StepShape, step_traffic
from hanlin.train import Trainer
from hanlin.train.prefetch import StepWork

STEPS, TRACED = 2, 1  # steps that are made; the last is traced: by then everything is warm


class TracedTrainer(Trainer):
    """Notes what this rank sends in the step `TRACED`, and what decides how much that is."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self.tracer, self.seen = Tracer(), {}
        self.chosen: dict[str, torch.Tensor] = {}  # of each router: how often each expert
        for name, module in self.model.named_modules():
            if isinstance(module, Router):
                self.chosen[name] = torch.zeros(len(module.weight), dtype=torch.int64)
                module.register_forward_hook(self._counter(name))

    def _counter(self, name: str) -> Any:
        def count(_: torch.nn.Module, __: Any, note: Routing) -> None:
            if self.state.step == TRACED:
                self.chosen[name] += torch.bincount(note.experts.flatten(), minlength=len(self.chosen[name]))

        return count

    def _totals(self, work: StepWork, stopping: bool) -> tuple[dict[str, float], int, bool]:
        if self.state.step != TRACED:
            return super()._totals(work, stopping)
        with self.tracer:
            return super()._totals(work, stopping)

    def _step(self, work: StepWork, *rest: Any) -> float | None:
        if self.state.step != TRACED:
            return super()._step(work, *rest)
        with self.tracer:
            rate = super()._step(work, *rest)
        mesh, context = self.cluster.mesh, self.cluster.context
        parts = [part if context is None else context.cut(part) for part in work.parts]
        expert = mesh.group("expert")
        self.seen = {
            "calls": [[call.op, call.payload, list(call.ranks)] for call in self.tracer.calls],
            "pipeline": mesh.index("pipeline"),
            "tensor": mesh.index("tensor"),
            "rows": len(parts[0].ids),
            "micro_batches": len(parts),
            "trained": sum(int(count_targets(part.targets)) for part in parts),
            "chosen": [count.tolist() for count in self.chosen.values()],
            "experts_with": [] if expert is None else dist.get_process_group_ranks(expert),
        }
        return rate


@dataclass(frozen=True)
class RankStep:
    """One rank's step: what the tracer saw, and what the planner says."""

    calls: list[Call]
    planned: list[Sent]


def trace_layouts(names: list[str], folder: Path, dtype: str = "float32") -> dict[str, list[RankStep]]:
    """Each layout's ranks; layouts of one number of processes share them."""
    found: dict[str, list[RankStep]] = {}
    for world in sorted({CASES[name][0] for name in names}):
        mine = [name for name in names if CASES[name][0] == world]
        processes = [in_own_process(_trace, rank, world, str(folder), mine, dtype) for rank in range(world)]
        for process in processes:
            process.join(900)
            if process.exitcode is None:
                process.kill()
        said = [file.read_text() for file in folder.glob("failed-*.txt")]
        assert not said and all(process.exitcode == 0 for process in processes), said
        for name in mine:
            ranks = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world)]
            found[name] = [
                RankStep(
                    [Call(op, payload, tuple(group)) for op, payload, group in ranks[rank]["calls"]],
                    planned(name, ranks, rank, getattr(torch, dtype)),
                )
                for rank in range(world)
            ]
    return found


def planned(name: str, ranks: list[dict[str, Any]], rank: int, dtype: torch.dtype) -> list[Sent]:
    """The planner's calls of a rank. It knows rows and length; tokens with a target and the routers' choices are those
    of the step."""
    world, axes, kind, rest = CASES[name]
    seen = ranks[rank]
    arrived = None
    if seen["experts_with"]:
        group = seen["experts_with"]
        place = group.index(rank)
        arrived = 0
        for other in group:
            for counts in ranks[other]["chosen"]:
                size = len(counts) // len(group)
                arrived += sum(counts[place * size : (place + 1) * size])
    shape = StepShape(
        seen["rows"], LENGTH, seen["micro_batches"], dtype.itemsize, dtype.itemsize, trained=seen["trained"],
        arrived=arrived, muon=rest.get("optimizer", {}).get("kind") == "muon",
    )  # fmt: skip
    layout = Layout.model_validate(axes).fitted(world)
    with torch.device("meta"):
        config = layout_model(kind).config
    return step_traffic(config, shape, layout, pipeline=seen["pipeline"], tensor=seen["tensor"])


def _trace(rank: int, world: int, folder: str, names: list[str], dtype: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    for name in names:
        try:
            trainer = make_trainer(name, None, getattr(torch, dtype), steps=STEPS, trainer=TracedTrainer)
            assert isinstance(trainer, TracedTrainer)
            trainer.fit()
        except Exception as error:
            (Path(folder) / f"failed-{name}-{rank}.txt").write_text(f"{name}: {type(error).__name__}: {error}")
            raise
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(trainer.seen))
    dist.destroy_process_group()
