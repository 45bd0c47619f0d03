"""Rounds that are begun before the one in front of them is learnt: which prompts, which weights, what corrects them.

The rollout here has two engines of its own in this process and writes an answer when it is asked for at last, with the
weights of when it was begun: what the actors of `RayRollout` do, without their processes.
"""

import pytest
import torch
from tests.align.on_policy_cases import model_folder, prompt_file, rl_recipe

from hanlin.align.build import build_model, resolve_settings, train
from hanlin.align.method import Parts
from hanlin.align.methods import open_data
from hanlin.align.on_policy_run import wire_on_policy
from hanlin.align.reference import trained_logprobs
from hanlin.align.rollout import LocalRollout, fill, plain_copy, plain_weights, prompt_seeds, write_turns
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.engine import Engine
from hanlin.train.reader import open_checkpoint


class Deferred:
    """A `Rollout`. begun: (version, numbers of the prompts) of every write, in order."""

    def __init__(self, model, tokenizer, **limits):
        self.model, self.tokenizer, self.begun, self.version = model, tokenizer, [], -1
        self.engines = [Engine(plain_copy(model, torch.float32), tokenizer, **limits) for _ in range(2)]

    def refresh(self, version):
        self.weights, self.version = {name: t.clone() for name, t in plain_weights(self.model).items()}, version
        return 0.0

    def begin(self, prompts, params, *, copies, seed):
        self.begun.append((self.version, [prompt.number for prompt in prompts]))
        weights, version, seeds = self.weights, self.version, prompt_seeds(prompts, seed)

        def finish():
            samples, middle = [], len(prompts) // 2
            for engine, own in zip(self.engines, (slice(0, middle), slice(middle, None)), strict=True):
                fill(engine.model, weights)
                if prompts[own]:
                    samples += write_turns(
                        engine, self.tokenizer, prompts[own], params, copies=copies, seed=seed, version=version,
                        salt=f"weights {version}", seeds=seeds[own],
                    )  # fmt: skip
            return samples

        return finish

    def write(self, prompts, params, *, copies, seed):
        return self.begin(prompts, params, copies=copies, seed=seed)()

    def close(self):
        for engine in self.engines:
            engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return model_folder(tmp_path_factory.mktemp("policy") / "model", tokenizer)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prompt_file(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture
def deferred(monkeypatch):
    """Every rollout that a recipe opens, in order."""
    opened = []

    def open_rollout(objective, model, tokenizer, asked, *, device):
        opened.append(Deferred(model, tokenizer, max_batch=8))
        return opened[-1]

    monkeypatch.setattr("hanlin.align.on_policy_run.open_rollout", open_rollout)
    return opened


def ahead(lag):
    return {"rollout": {"kind": "ray", "lag": lag}}


def wired(recipe, tokenizer):
    data = open_data(recipe, tokenizer)
    settings, _ = resolve_settings(recipe, data)
    model = build_model(recipe, tokenizer, data.seq_len)
    return model, wire_on_policy(Parts(recipe, tokenizer, data, settings, model, None))


def steps_of(recipe):
    return [row for row in read_metrics(recipe.out / "metrics.jsonl") if "loss" in row]


def test_without_a_lag_two_engines_teach_what_one_does(folder, prompts, tmp_path, deferred, monkeypatch):
    other = rl_recipe(folder, prompts, tmp_path, name="two", **ahead(0))
    train(other, quiet=True)
    monkeypatch.undo()
    one = rl_recipe(folder, prompts, tmp_path, name="one")
    train(one, quiet=True)
    assert len(deferred) == 1 and [version for version, _ in deferred[0].begun] == [0, 1, 2, 3]
    for a, b in zip(steps_of(one), steps_of(other), strict=True):
        assert (a["reward"], a["answer/length"]) == (b["reward"], b["answer/length"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_a_run_may_go_on_with_another_rollout(folder, prompts, tmp_path, deferred, monkeypatch):
    """Who writes does not matter; how far ahead does, and is refused."""
    chosen = {"schedule": {"kind": "constant"}}
    train(rl_recipe(folder, prompts, tmp_path, train={**chosen, "steps": 2}, **ahead(0)), quiet=True)
    with pytest.raises(HanlinError, match="lag"):
        train(rl_recipe(folder, prompts, tmp_path, train={**chosen, "steps": 4}, **ahead(1)), quiet=True)
    monkeypatch.undo()
    changed = rl_recipe(folder, prompts, tmp_path, train={**chosen, "steps": 4})
    train(changed, quiet=True)
    whole = rl_recipe(folder, prompts, tmp_path, name="whole", train={**chosen, "steps": 4})
    train(whole, quiet=True)
    assert [row["reward"] for row in steps_of(changed)] == [row["reward"] for row in steps_of(whole)]


@pytest.mark.parametrize("lag", [1, 3])
def test_rounds_ahead_ask_the_same_prompts_with_older_weights(folder, prompts, tmp_path, deferred, lag):
    """Round n is written with version max(0, n - lag), whatever an evaluation in between refreshes."""
    held_out = {"held_out": [prompts], "held_out_rows": 2}
    for name, chosen in (("ahead", lag), ("now", 0)):
        train(rl_recipe(folder, prompts, tmp_path, name=name, train={"eval_every": 2}, **held_out, **ahead(chosen)))
    first, second = ([(v, asked) for v, asked in rollout.begun if v < 10**9] for rollout in deferred)
    assert [asked for _, asked in first][:4] == [asked for _, asked in second]
    assert [version for version, _ in first] == [max(0, n - lag) for n in range(4 + lag)]
    rows = steps_of(rl_recipe(folder, prompts, tmp_path, name="ahead"))
    assert [row["rollout/lag"] for row in rows] == [min(n, lag) for n in range(4)]
    assert "rollout/lag" not in steps_of(rl_recipe(folder, prompts, tmp_path, name="now"))[0]


def test_old_answers_count_by_their_importance(folder, prompts, tmp_path, tokenizer, deferred):
    """tis, cap 2: w = min(exp(log p before the update - log p of the drawing), 2); 1 while the weights are the same."""
    model, wiring = wired(rl_recipe(folder, prompts, tmp_path, **ahead(1)), tokenizer)
    fresh = wiring.source.batch(0)
    _, metrics = wiring.objective.loss(model, fresh)
    assert metrics["rollout/weight"][0] == pytest.approx(metrics["rollout/weight"][1], rel=1e-5)
    assert metrics["rollout/cut"][0] == 0 and metrics["ratio"][0] == pytest.approx(metrics["ratio"][1], rel=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    stale = wiring.source.batch(1)
    _, metrics = wiring.objective.loss(model, stale)
    with torch.no_grad():
        weight = (trained_logprobs(model, stale) - stale.of_trained("drawn")).exp().clamp(max=2.0)
    total, n = metrics["rollout/weight"]
    assert total == pytest.approx(float(weight.sum()), rel=1e-4) and abs(total / n - 1) > 1e-3
    assert metrics["ratio"][0] == pytest.approx(metrics["ratio"][1], rel=1e-5), "the update itself begins at ratio 1"
    wiring.close()


def test_answers_too_old_are_refused(folder, prompts, tmp_path, deferred, monkeypatch):
    class Deaf(LocalRollout):
        def refresh(self, version):
            return super().refresh(min(version, 1))

    def open_rollout(objective, model, tokenizer, asked, *, device):
        return Deaf(model, tokenizer, max_batch=8)

    monkeypatch.setattr("hanlin.align.on_policy_run.open_rollout", open_rollout)
    with pytest.raises(HanlinError, match=r"Round 2 got answers of version 1 .* the oldest may be 2"):
        train(rl_recipe(folder, prompts, tmp_path), quiet=True)


@pytest.mark.parametrize("batch", [6, 3])
def test_a_run_that_goes_on_writes_the_rounds_under_way_anew(folder, prompts, tmp_path, deferred, batch):
    """The prompts come in the same order; what was begun before the stop is begun again, with the newer weights. With
    two steps a round the checkpoint stands in the middle of one, whose answers are kept."""
    chosen = {"schedule": {"kind": "constant"}, "save_every": 1, "batch_size": batch}
    a_round = 6 // batch
    whole = rl_recipe(folder, prompts, tmp_path, name="whole", train={**chosen, "steps": 5 * a_round}, **ahead(1))
    train(whole, quiet=True)
    for steps in (3 * a_round - (a_round - 1), 5 * a_round):
        cut = rl_recipe(folder, prompts, tmp_path, name="cut", train={**chosen, "steps": steps}, **ahead(1))
        train(cut, quiet=True)
    asked = [prompt for _, prompt in deferred[0].begun]
    assert deferred[1].begun == [(0, asked[0]), (0, asked[1]), (1, asked[2]), (2, asked[3])]
    assert deferred[2].begun == [(3, asked[3]), (3, asked[4]), (4, asked[5])]
    states = [open_checkpoint(Run(recipe.out).checkpoints()[-1][1]).state["source"] for recipe in (whole, cut)]
    assert states[0] == states[1] and (states[0]["cursor"], states[0]["round"]) == (10, 4)


def test_what_draws_again_cannot_be_written_ahead(folder, prompts, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="dapo draws more prompts"):
        rl_recipe(folder, prompts, tmp_path, kind="dapo", **ahead(1))
    assert rl_recipe(folder, prompts, tmp_path, kind="dapo", **ahead(0)).objective.lag == 0


def test_the_correction_of_a_lag_is_said(folder, prompts, tmp_path, tokenizer):
    def said(**more):
        return "; ".join(open_data(rl_recipe(folder, prompts, tmp_path, **more), tokenizer).notes)

    assert "tis up to 2 (objective.correction is not given)" in said(**ahead(1))
    assert "mask up to 3" in said(correction={"mode": "mask", "cap": 3.0}, **ahead(1))
    assert "ahead" not in said(**ahead(0))
