"""How the reference libraries are called without what they are usually called by: no GPU, no trainer, no cluster.

Only `make.py` imports this, in an environment of its own (its docstring says which). Trainers' loss methods run on a
stand-in for the trainer; statements in the middle of a long method are run by themselves, read from the library's file.
"""

import importlib.machinery
import importlib.util
import sys
import textwrap
import types
from collections import defaultdict
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

ABSENT = ("ray", "deepspeed", "torchao", "wandb", "aiohttp", "openrlhf.trainer.ray", "vllm")


class Absent(MetaPathFinder, Loader):
    """What the libraries import and the formulas do not need."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == absent or name.startswith(f"{absent}.") for absent in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, f"{package} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


def bare(package: str, folder: Path) -> None:
    """A package of which no `__init__` is run, so that its modules can be imported one by one."""
    module = types.ModuleType(package)
    module.__path__ = [str(folder)]
    module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
    sys.modules[package] = module


def prepare() -> None:
    """Everything needed is importable afterwards."""
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer  # noqa: F401  before vllm is absent

    sys.meta_path.insert(0, Absent(ABSENT))
    for package in ("verl", "openrlhf", "torchtune"):
        bare(package, folder_of(package))
    for part in ("models", "trainer", "trainer/ppo_utils", "utils"):
        bare("openrlhf." + part.replace("/", "."), Path(sys.modules["openrlhf"].__path__[0]) / part)


def run_lines(file: Path, first: str, last: str, **names: Any) -> dict[str, Any]:
    """Run the statements of a file from the line that begins with `first` to the next that begins with `last`."""
    lines = file.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(n for n in range(start, len(lines)) if lines[n].strip().startswith(last))
    names["torch"] = torch
    exec(textwrap.dedent("\n".join(lines[start : stop + 1])), names)
    return names


def stand_in(**settings: Any) -> MagicMock:
    """A trainer of one process."""
    trainer = MagicMock()
    accelerator = SimpleNamespace(
        num_processes=1, device="cpu", gather=_same, gather_for_metrics=_same, reduce=lambda x, reduction: x,
        sync_gradients=True, unwrap_model=_same,
    )  # fmt: skip
    trainer.configure_mock(
        accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False, use_vllm=False,
        precompute_ref_logps=True, _metrics=defaultdict(lambda: defaultdict(list)),
        current_gradient_accumulation_steps=1, _total_train_tokens=0, _tp_size=1, **settings,
    )  # fmt: skip
    return trainer


def _same(x: Tensor) -> Tensor:
    return x


def speaking(logps: Tensor) -> Any:
    """A model whose fused head says these log-probabilities (rows, T)."""
    zero = torch.zeros_like(logps)
    said = SimpleNamespace(log_probs=logps, entropy=zero, mean_logits=zero, is_top1=zero.bool())
    return lambda **inputs: said
