"""The stability tools in the real trainer: spikes left out or rolled back, averages, z-loss, balance, range test."""

import pytest
import torch
from tiny_training import TinySource, tiny_model, train, weights

from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.data.batch import Batch
from hanlin.models.config import AttentionConfig, ExpertsConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import IGNORE
from hanlin.nn.routing import RouterConfig
from hanlin.train import CausalLM, Trainer, TrainSettings
from hanlin.train.objective import document_mask
from hanlin.train.reader import export_weights, open_checkpoint


class Spiked(TinySource):
    """Batches of one row's tokens over and over in the data steps `bad`: what was learnt there is badly wrong."""

    def __init__(self, rows: int, bad: tuple[int, ...], **rest) -> None:
        super().__init__(rows, **rest)
        self.bad = bad

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        batch = super().batch(0, start, stop)  # one batch again and again: the loss falls far
        targets = batch.targets.clone()
        targets[:, step % 5] = IGNORE  # so that it matters which step was left out
        if step in self.bad:
            targets = torch.where(targets >= 0, (targets * 7 + 3) % 61, targets)
        return Batch(batch.ids, targets, batch.positions, batch.documents, batch.names)

    def fingerprint(self):
        return super().fingerprint() | {"bad": list(self.bad)}


class Without(Spiked):
    """The same, with some data steps left out."""

    def __init__(self, rows: int, left_out: tuple[int, ...]) -> None:
        super().__init__(rows, ())
        self.left_out = left_out

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        for skipped in self.left_out:
            step += skipped <= step
        return super().batch(step, start, stop)


SETTINGS = {"steps": 60, "log_every": 1, "clip": None, "schedule": {"kind": "constant"}, "batch_size": 8, "lr": 3e-3}
SPIKES = {"window": 16, "threshold": 8.0}


def test_a_planted_spike_is_left_out_and_the_run_is_the_one_without_its_rows(tmp_path):
    settings = SETTINGS | {"spikes": {"action": "skip"} | SPIKES}
    train(tmp_path / "spiked", settings, data=Spiked(8, (40,)))
    train(tmp_path / "plain", SETTINGS, data=Without(8, (40,)))
    one, other = weights(tmp_path / "spiked"), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_planted_spike_is_rolled_back_to_the_checkpoint_and_a_resumed_run_remembers(tmp_path):
    """Checkpoints at 10, 20, 30; data step 37 spikes. Back at 30, data steps 36 and 37 are left out."""
    settings = SETTINGS | {"spikes": {"action": "rollback", "before": 1} | SPIKES, "save_every": 10, "keep_last": 9}
    train(tmp_path / "spiked", settings | {"steps": 45}, data=Spiked(8, (37,)))
    train(tmp_path / "spiked", settings, data=Spiked(8, (37,)))
    train(tmp_path / "plain", SETTINGS, data=Without(8, (36, 37)))
    one, other = weights(tmp_path / "spiked"), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in other)
    rows = [row["step"] for row in read_metrics(Run(tmp_path / "spiked").metrics)]
    assert rows == list(range(1, 61)), "each step stands once, in order"


def test_rollback_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(HanlinError, match=r"set train\.save_every"):
        train(tmp_path, SETTINGS | {"spikes": {"action": "rollback"}})


def test_the_average_is_what_is_evaluated_saved_and_resumed(tmp_path):
    """Closed form: a <- d a + (1 - d) w after each step, from a copy of every step's weights."""
    seen = []

    class Watching(CausalLM):
        def run(self, model, batch):
            seen.append(model.model.norm.weight.detach().clone())
            return super().run(model, batch)

    settings = SETTINGS | {"steps": 6, "average": {"decay": 0.9, "warmup": False}, "eval_every": 6}
    asked = []

    def evaluate(model, step):
        asked.append(model.model.norm.weight.detach().clone())
        return {"eval/loss": 1.0}

    train(tmp_path, settings, objective=Watching(), evaluate=evaluate)
    final = weights(tmp_path)["model.norm.weight"]
    average = seen[0]
    for weight in [*seen[1:], final]:
        average = 0.9 * average + 0.1 * weight
    torch.testing.assert_close(asked[0], average, rtol=0, atol=1e-6)
    reader = open_checkpoint(Run(tmp_path).checkpoints()[-1][1])
    torch.testing.assert_close(export_weights(reader, average=True)["model.norm.weight"], average, rtol=0, atol=1e-6)
    train(tmp_path / "b", settings | {"steps": 3}, evaluate=evaluate)
    train(tmp_path / "b", settings, evaluate=evaluate)
    torch.testing.assert_close(asked[-1], average, rtol=0, atol=1e-6)


def test_z_loss_is_the_mean_square_of_logsumexp_of_trained_tokens():
    model, batch = tiny_model().double(), TinySource(8).batch(0)
    terms, metrics = CausalLM(z_loss=0.5).loss(model, batch)
    logits = model(batch.ids, positions=batch.positions, mask=document_mask(batch)).logits
    kept = batch.targets >= 0
    squares = logits[kept].logsumexp(-1).square().sum()
    torch.testing.assert_close(terms[1][0], 0.5 * squares, rtol=1e-12, atol=0)
    assert metrics["z_loss"] == (pytest.approx(float(squares.detach())), float(kept.sum()))


def moe(correction: bool = False) -> Transformer:
    torch.manual_seed(0)
    router = RouterConfig(2, kind="sigmoid" if correction else "softmax", correction=correction)
    config = ModelConfig.uniform(
        "qwen3_moe", depth=2, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm=True),
        feed_forward=ExpertsConfig(8, 16, router), vocab_size=61, width=32,
    )  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():  # a router that prefers two experts
        for layer in model.model.layers:
            layer.mlp.router.weight[:2] += 0.3
    return model


@pytest.mark.parametrize(
    ("choice", "correction"), [({"kind": "loss", "weight": 0.3}, False), ({"kind": "bias", "rate": 0.02}, True)]
)
def test_balance_makes_the_busiest_expert_less_busy(tmp_path, choice, correction):
    settings = SETTINGS | {"steps": 60, "lr": 1e-3, "micro_batch_size": 4}
    worst = {}
    for name, balance in (("without", None), ("with", choice)):
        train(tmp_path / name, settings | {"balance": balance}, model=moe(correction))
        rows = read_metrics(Run(tmp_path / name).metrics)
        worst[name] = rows[-1]["router/max_violation"]
    assert worst["with"] < 0.7 * worst["without"], worst


def test_balance_does_not_depend_on_micro_batches(tmp_path):
    """fp64: 8 rows at once and 8 times one row give the same weights, <= 1e-12."""
    settings = SETTINGS | {"steps": 5, "balance": {"kind": "loss"}, "router_z_loss": 1e-2}
    for name, size in (("whole", 8), ("single", 1)):
        train(tmp_path / name, settings | {"micro_batch_size": size}, model=moe().double())
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "single")
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-12 * one[name].norm().clamp_min(1e-3), name


def test_balancing_what_has_no_experts_is_refused(tmp_path):
    with pytest.raises(HanlinError, match="for models with experts"):
        train(tmp_path, SETTINGS | {"balance": {"kind": "loss"}})


def test_the_range_test_leaves_nothing_behind(tmp_path):
    settings = TrainSettings.model_validate(SETTINGS | {"precision": "fp32"})
    trainer = Trainer(tiny_model(), CausalLM(), TinySource(8), settings, quiet=True)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    found = trainer.find_lr(low=1e-5, high=1.0, steps=30)
    assert 1e-5 < found.suggestion < 1.0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert not trainer.optimizer.state()


def test_monitors_are_logged_when_asked(tmp_path):
    train(tmp_path, SETTINGS | {"steps": 4, "monitor_every": 2})
    rows = read_metrics(Run(tmp_path).metrics)
    assert "update_ratio/matrices" not in rows[0] and 0 < rows[1]["update_ratio/matrices"] < 1
    assert rows[1]["grad_norm/matrices"] <= rows[1]["grad_norm"] * (1 + 1e-6)
