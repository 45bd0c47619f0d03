"""The loop: denominators over the step, refusals, non-finite steps, evaluation, timing, precision, compilation."""

import math

import pytest
import torch
from tiny_training import TinySource, assert_same_bits, tiny_model, train

from hanlin.core.errors import HanlinError
from hanlin.core.metrics import TRAIN_KEYS, read_metrics
from hanlin.core.runs import Run
from hanlin.train import CausalLM, Trainer, TrainSettings


def trainer_of(model, data=None, run=None, **settings) -> Trainer:
    chosen = TrainSettings.model_validate({"batch_size": 32, "steps": 4, "precision": "fp32", **settings})
    return Trainer(model, CausalLM(), data or TinySource(chosen.batch_size), chosen, run=run, quiet=True)


def step_gradients(micro_batch_size: int | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    trainer = trainer_of(tiny_model().to(dtype), micro_batch_size=micro_batch_size)
    work = trainer._prepare(0)
    assert len(work.parts) == (1 if micro_batch_size is None else 32 // micro_batch_size)
    counts = [CausalLM().count(part)["tokens"] for part in work.parts]
    assert micro_batch_size is None or len(set(counts)) > 1, "equal counts would hide a mean of means"
    trainer.backward(work, trainer._totals(work, False)[0])
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("micro_batch_size", [8, 1, 16])
def test_accumulated_micro_batches_equal_the_large_batch(dtype, tolerance, micro_batch_size):
    """4 x 8 = 32, relative L2 of every gradient tensor, with unequal (and zero) numbers of targets in the parts."""
    whole, parts = step_gradients(None, dtype), step_gradients(micro_batch_size, dtype)
    assert whole.keys() == parts.keys() and len(whole) == 21
    for name in whole:
        assert (parts[name] - whole[name]).norm() <= tolerance * whole[name].norm(), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_gives_the_same_trained_weights(optimizer):
    """Four whole steps with clipping and either optimiser, fp64: relative L2 of every weight <= 1e-12."""
    models = [tiny_model().double() for _ in range(2)]
    for model, micro in zip(models, (None, 8), strict=True):
        trainer_of(model, optimizer={"kind": optimizer}, micro_batch_size=micro, clip=0.1).fit()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a - b).norm() <= 1e-12 * a.norm(), name


def test_the_step_is_the_optimizer_on_the_mean_loss_over_all_trained_tokens():
    """Against a plain loop: logits, F.cross_entropy, torch's AdamW and its own clipping; fp64, 1e-12."""
    source, ours, theirs = TinySource(8), tiny_model().double(), tiny_model().double()
    settings = {"batch_size": 8, "steps": 5, "lr": 0.01, "clip": 0.5, "schedule": {"kind": "constant", "warmup": 0.6}}
    trainer_of(ours, source, **settings).fit()
    decayed = [p for p in theirs.parameters() if p.ndim == 2 and p is not theirs.model.embed_tokens.weight]
    rest = [p for p in theirs.parameters() if all(p is not q for q in decayed)]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                             betas=(0.9, 0.95))  # fmt: skip
    for step, rate in enumerate([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01]):
        total, count = torch.zeros((), dtype=torch.float64), 0
        batch = source.batch(step)
        for row in range(8):
            for document in range(int(batch.documents[row].max()) + 1):
                ids = batch.ids[row][batch.documents[row] == document]
                logits = theirs(ids[None]).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
                count += len(ids) - 1
        adam.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a - b[1]).norm() <= 1e-12 * a.norm(), name


def test_a_run_learns_and_logs_every_key(tmp_path):
    data = TinySource(8)
    data.batch = lambda step, start=0, stop=None: TinySource(8).batch(
        0, start, stop
    )  # one batch, to be learnt by heart
    result = train(tmp_path, {"steps": 60, "log_every": 20, "lr": 0.02, "optimizer": {"kind": "muon"}}, data=data)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 20, 40, 60]
    assert all(set(TRAIN_KEYS) <= row.keys() for row in rows)
    assert rows[0]["loss"] > 4 and rows[-1]["loss"] < 1
    assert result.finished and result.step == 60 and result.metrics["loss"] == rows[-1]["loss"]
    assert all(0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in rows)
    assert rows[-1]["tokens"] == 60 * TinySource(8).batch(0).tokens


def test_evaluation_comes_when_due_without_gradients_and_without_touching_training(tmp_path):
    seen = []

    def look(model, step):
        seen.append((step, model.training, torch.is_grad_enabled()))
        return {"eval/loss": 1.0 / step, "eval/名": 2.0}

    one, other = tiny_model(), tiny_model()
    train(tmp_path, {"steps": 7, "eval_every": 3}, model=one, evaluate=look)
    train(None, {"steps": 7}, model=other)
    assert seen == [(3, False, False), (6, False, False), (7, False, False)]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "eval/loss" in row]
    assert [(row["step"], row["eval/名"]) for row in rows] == [(3, 2.0), (6, 2.0), (7, 2.0)]
    assert_same_bits(one.state_dict(), other.state_dict())


def test_epochs_become_steps():
    data = TinySource(8, steps_per_epoch=5)
    assert train(None, {"epochs": 1.5}, data=data).step == 8
    with pytest.raises(HanlinError, match="has no end"):
        train(None, {"epochs": 1}, data=TinySource(8))


def test_settings_that_could_not_act_are_refused():
    for settings, message in [
        ({"steps": 1, "batch_size": 4}, "8 rows a step"),
        ({"steps": 1, "save_every": 1}, "need a run folder"),
        ({"steps": 1, "trackers": ["tensorboard"]}, "need a run folder"),
        ({"steps": 1, "eval_every": 1}, "nothing to evaluate on"),
    ]:
        with pytest.raises(HanlinError, match=message):
            train(None, settings, data=TinySource(8), evaluate=None)
    frozen = tiny_model().requires_grad_(False)
    with pytest.raises(HanlinError, match="no trainable parameter"):
        train(None, {"steps": 1}, model=frozen)


class OneBadDocument(TinySource):
    """The last token of the vocabulary stands in row 2 of step 4 only."""

    def batch(self, step, start=0, stop=None):
        batch = super().batch(step, start, stop)
        batch.ids.clamp_(max=59)
        if step == 4:
            batch.ids[2, 0] = 60
        return batch


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_a_non_finite_loss_names_step_documents_and_the_last_good_checkpoint(tmp_path, micro_batch_size):
    model = tiny_model()
    model.model.embed_tokens.weight.data[60] = math.nan
    settings = {"steps": 9, "save_every": 2, "micro_batch_size": micro_batch_size, "optimizer": {"kind": "muon"}}
    with pytest.raises(HanlinError) as caught:
        train(tmp_path, settings, model=model, data=OneBadDocument(8))
    message = str(caught.value)
    assert "Step 5: the loss is nan" in message and "row 2 of 8 is non-finite" in message
    assert "(documents: book-4-2)" in message and "book-4-3" not in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / 'step-4'}." in message
    assert [step for step, _ in Run.open(tmp_path).checkpoints()] == [2, 4]
    assert all(torch.isfinite(p).all() for n, p in model.named_parameters() if "embed" not in n)


def test_diverged_weights_are_told_from_one_bad_document():
    model = tiny_model()
    model.model.norm.weight.data[0] = math.inf
    with pytest.raises(HanlinError, match=r"Every row's loss alone is non-finite .*book-0-0, book-0-2"):
        train(None, {"steps": 1}, model=model)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_timing_steps_leaves_no_trace(optimizer):
    models = [tiny_model(), tiny_model()]
    trainers = [trainer_of(m, optimizer={"kind": optimizer}, steps=6) for m in models]
    before = torch.get_rng_state()
    assert 0 < trainers[0].time_steps(2) < 10
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(models[0].state_dict(), tiny_model().state_dict())
    for trainer in trainers:
        trainer.fit()
    assert_same_bits(models[0].state_dict(), models[1].state_dict())


def test_bf16_activations_train_fp32_weights_and_the_model_is_given_back_as_it_was():
    exact, mixed = tiny_model(), tiny_model().eval()
    dtypes = set()

    def look(model, step):
        dtypes.add(model(torch.arange(4)[None]).hidden.dtype)
        return {}

    train(None, {"steps": 10, "precision": "fp32"}, model=exact)
    train(None, {"steps": 10, "precision": "bf16", "eval_every": 5}, model=mixed, evaluate=look)
    assert dtypes == {torch.bfloat16}
    assert mixed.compute_dtype is None and not mixed.training
    assert all(p.dtype == torch.float32 and p.grad is None for p in mixed.parameters())
    start = tiny_model()
    for a, b, s in zip(exact.parameters(), mixed.parameters(), start.parameters(), strict=True):
        assert not torch.equal(a, b) and (a - b).norm() <= 0.5 * (a - s).norm()


def test_half_precision_weights_are_widened_not_trained_in_eight_bits():
    model = tiny_model().bfloat16()
    train(None, {"steps": 1}, model=model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_evaluation_that_is_not_a_number_is_logged_saved_and_never_the_best(tmp_path):
    losses = iter([math.nan, 2.0, math.nan])
    settings = {"steps": 6, "eval_every": 2, "keep_best": True, "keep_last": 1}
    train(tmp_path, settings, evaluate=lambda model, step: {"eval/loss": next(losses)})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [None, 2.0, None]
    assert [step for step, _ in Run.open(tmp_path).checkpoints()] == [4, 6]
    assert train(tmp_path, settings).step == 6


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"steps": 6, "eval_every": 3, "trackers": ["tensorboard"]}
    train(tmp_path, settings)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [e.step for e in events.Scalars("train/loss")] == [row["step"] for row in rows if "loss" in row] == [1, 3, 6]
    assert [e.value for e in events.Scalars("eval/loss")] == pytest.approx(
        [r["eval/loss"] for r in rows if "eval/loss" in r]
    )


def test_an_error_of_the_data_reaches_the_caller():
    class Broken(TinySource):
        def batch(self, step, start=0, stop=None):
            if step == 2:
                raise HanlinError("shard 3 is cut off")
            return super().batch(step, start, stop)

    with pytest.raises(HanlinError, match="shard 3 is cut off"):
        train(None, {"steps": 5}, data=Broken(8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own look at it
def test_compiled_training_equals_eager_training():
    """torch.compile of the model, fp64 weights: relative L2 of every gradient <= 1e-6 (the rotary tables are fp32 in
    any precision, and the compiled sine rounds otherwise); then a whole run, after which the model is eager again."""
    gradients = []
    for compile in (False, True):
        trainer = trainer_of(tiny_model().double(), TinySource(8), batch_size=8, steps=2, compile=compile)
        with trainer._training():
            assert (trainer.model._compiled_call_impl is not None) == compile
            work = trainer._prepare(0)
            trainer.backward(work, trainer._totals(work, False)[0])
            gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        assert trainer.fit().finished and trainer.model._compiled_call_impl is None
    for name, eager in gradients[0].items():
        assert (gradients[1][name] - eager).norm() <= 1e-6 * eager.norm(), name
