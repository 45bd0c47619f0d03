"""What two ranks must not lose, or do to each other: averages, frozen weights, hooks of an earlier trainer, errors."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.train.tiny_training import TinySource, in_own_process, tiny_model

from hanlin.core.errors import HanlinError
from hanlin.core.runs import Run
from hanlin.parallel.settings import Layout
from hanlin.train import CausalLM, Trainer, TrainSettings
from hanlin.train.checkpoint import newest_checkpoint
from hanlin.train.reader import export_weights, open_checkpoint
from hanlin.train.refusals import refuse_what_cannot_act

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

STEPS = 3


def trainer_of(run: Run | None, *, layout: dict[str, Any] | None = None, model=None, **rest: Any) -> Trainer:
    values = {"batch_size": 8, "precision": "fp32", "lr": 1e-2, "steps": STEPS, "schedule": {"kind": "constant"}}
    settings = TrainSettings.model_validate(values | rest)
    return Trainer(
        tiny_model() if model is None else model, CausalLM(), TinySource(8), settings,
        layout=None if layout is None else Layout.model_validate(layout), run=run, quiet=True,
    )  # fmt: skip


def exported(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    with trainer.whole_model() as whole:
        return None if whole is None else {name: tensor.clone() for name, tensor in whole.state_dict().items()}


def averages(root: Path, shard: str) -> float:
    """The largest distance of an exported weight from the checkpoint's average."""
    run = Run(root / shard)
    trainer = trainer_of(run, layout={"shard": shard}, average={"decay": 0.5})
    trainer.fit()
    mine = exported(trainer)
    wanted = export_weights(open_checkpoint(run.checkpoints()[-1][1]), average=True)
    if mine is None:
        return 0.0
    return max(float((mine[name] - wanted[name]).abs().max()) for name in wanted)


def frozen(root: Path) -> dict[str, bool]:
    """zero3 over a model whose embedding is not trained: it is kept, and a run goes on."""
    run, model = Run(root / "frozen"), tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    trainer = trainer_of(run, layout={"shard": "zero3"}, model=model)
    trainer.fit()
    mine = exported(trainer)
    again = tiny_model(seed=5)
    again.model.embed_tokens.weight.requires_grad_(False)
    longer = trainer_of(run, layout={"shard": "zero3"}, model=again, steps=STEPS + 2)
    finished = longer.fit().finished
    later = exported(longer)
    kept = [found is None or torch.equal(found["model.embed_tokens.weight"], before) for found in (mine, later)]
    return {"kept": kept[0], "kept later": kept[1], "finished": finished}


def successors(root: Path) -> list[float]:
    """Two trainers after each other on one model, data parallel and ZeRO."""
    found = []
    for shard in ("none", "zero2"):
        model = tiny_model()
        for _ in range(2):
            trainer = trainer_of(None, layout={"shard": shard}, model=model)
            found.append(float(trainer.fit().metrics["loss"]))
            trainer.close()
    return found


def not_finite(root: Path) -> str:
    """What zero3 says of a gradient that is not a number."""
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    try:
        trainer_of(None, layout={"shard": "zero3"}, model=model).fit()
    except HanlinError as error:
        return str(error)
    return ""


def half_frozen(root: Path) -> bool:
    """A pipeline whose first rank has nothing to train."""
    run, model = Run(root / "half"), tiny_model()
    for module in (model.model.embed_tokens, model.model.layers[0]):
        module.requires_grad_(False)
    return trainer_of(run, layout={"pipeline": 2}, model=model, micro_batch_size=2).fit().finished


def one_of_two(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    folder = Path(root)
    for name in ("zero1", "zero2", "frozen", "half"):
        Run.open(folder / name)
    found = {
        "zero1": averages(folder, "zero1"), "zero2": averages(folder, "zero2"), "frozen": frozen(folder),
        "successors": successors(folder), "half frozen": half_frozen(folder), "not finite": not_finite(folder),
    }  # fmt: skip
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    processes = [in_own_process(one_of_two, rank, str(root)) for rank in range(2)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    return root, [json.loads((root / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("shard", ["zero1", "zero2"])
def test_the_exported_model_is_the_average_to_the_last_bit(found, shard):
    assert [mine[shard] for mine in found[1]] == [0.0, 0.0]


def test_frozen_weights_are_kept_where_ranks_share_them(found):
    assert found[1][0]["frozen"] == found[1][1]["frozen"] == {"kept": True, "kept later": True, "finished": True}
    names = set(newest_checkpoint(Run(found[0] / "frozen"), pytest.fail).model)
    assert "model.embed_tokens.weight" in names


def test_a_second_trainer_goes_on_with_the_first_ones_model(found):
    for mine in found[1]:
        for first, second in zip(mine["successors"][::2], mine["successors"][1::2], strict=True):
            assert second < first


def test_a_rank_with_nothing_to_train_takes_part(found):
    assert all(mine["half frozen"] for mine in found[1])


def test_zero3_tells_where_a_gradient_went_bad(found):
    for mine in found[1]:
        assert "not finite" in mine["not finite"] and "layers.1" in mine["not finite"]


@pytest.mark.parametrize("optimizer", [{"kind": "adamw", "state_bits": 8}, {"kind": "adafactor"}])
def test_states_that_could_not_be_cut_anew_are_refused_before_the_first_step(tmp_path, optimizer):
    settings = TrainSettings.model_validate({"batch_size": 8, "steps": 1, "lr": 1e-3, "optimizer": optimizer})
    with pytest.raises(HanlinError, match="cannot be cut anew"):
        refuse_what_cannot_act(settings, TinySource(8), Run.open(tmp_path / "run"), None, Layout(data=2, expert=2))


def test_trials_leave_the_average_and_the_loss_scale_alone():
    trainer = trainer_of(None, average={"decay": 0.5}, precision="fp16")
    trainer.scale.scale = 2.0**40  # overflows at first
    before = {name: tensor.clone() for name, tensor in trainer.average.state().items()}
    trainer.time_steps(1)
    assert trainer.find_lr(steps=20).suggestion > 0
    assert trainer.scale.scale == 2.0**40
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.average.state().items())
