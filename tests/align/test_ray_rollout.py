"""Answers from processes of Ray, for real: the same as the local engine's, one process killed, learning with a lag."""

import os
import signal
import statistics
import time
from importlib.util import find_spec

import psutil
import pytest
import torch
from tests.align.on_policy_cases import model_folder, prompt_file, rl_recipe

from hanlin.align.build import train
from hanlin.align.rollout import LocalRollout, Turns
from hanlin.align.samples import Prompt
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.engine import SamplingParams
from hanlin.models import load_model

# not importorskip: Ray must be loaded by `core.local_ray`, which closes it to others
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")]

TEXTS = ["one two", "二加二", "three four five", "1 + 2?", "one two", "9 + 9", "seven"]
PARAMS = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return model_folder(tmp_path_factory.mktemp("policy") / "model", tokenizer)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prompt_file(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="module")
def asked(tokenizer):
    """One of them twice."""
    return [Prompt(tuple(tokenizer.encode(text)), text, {"answer": "4"}, TEXTS.index(text)) for text in TEXTS]


def moved(model, seed):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


def same(samples, others):
    """Every token and all that is said of it, log-probabilities to 1e-5."""
    kept = [[(s.prompt, list(s.ids), s.text, list(s.written), s.finish, s.group) for s in x] for x in (samples, others)]
    drawn = [[value for s in x for value in s.logp] for x in (samples, others)]
    return kept[0] == kept[1] and drawn[0] == pytest.approx(drawn[1], abs=1e-5)


def local(model, tokenizer, asked, params, *, copies=3, seed=7, **more):
    rollout = LocalRollout(model, tokenizer, max_batch=8, **more)
    rollout.refresh(0)
    samples = rollout.write(asked, params, copies=copies, seed=seed)
    rollout.close()
    return samples


@pytest.fixture(scope="class")  # and not the module: a process has one Ray at a time
def rollout(folder, tokenizer):
    from hanlin.align.ray_rollout import RayRollout

    model = load_model(folder, dtype=torch.float32, device="cpu")
    rollout = RayRollout(model, tokenizer, actors=2, threads=1, max_batch=8)
    yield rollout
    family = psutil.Process().children(recursive=True)
    rollout.close()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert len(family) > 3 and not [one.name() for one in alive if "ray" in one.name()]
    assert not rollout.folder.exists()


class TestTwoActors:
    def test_they_answer_as_the_local_engine_does(self, rollout, tokenizer, asked):
        rollout.refresh(0)
        for seed in (7, 8):
            samples = rollout.write(asked, PARAMS, copies=3, seed=seed)
            assert same(samples, local(rollout.model, tokenizer, asked, PARAMS, seed=seed))
            assert {s.version for s in samples} == {0} and not any(s.notes for s in samples)
        [alone] = rollout.write(asked[:1], PARAMS, copies=1, seed=7)  # fewer prompts than actors
        assert alone.text and alone.group == 0

    def test_what_was_begun_is_finished_with_the_weights_of_then(self, rollout, tokenizer, asked):
        rollout.refresh(1)
        before = local(rollout.model, tokenizer, asked, PARAMS)
        pending = rollout.begin(asked, PARAMS, copies=3, seed=7)
        moved(rollout.model, 1)
        rollout.refresh(2)
        later = rollout.begin(asked, PARAMS, copies=3, seed=7)
        moved(rollout.model, 2)  # not told to anybody
        old, new = pending(), later()
        assert {s.version for s in old} == {1} and {s.version for s in new} == {2}
        assert same(old, before) and not same(new, before)
        rollout.refresh(3)
        assert same(rollout.write(asked, PARAMS, copies=3, seed=7), local(rollout.model, tokenizer, asked, PARAMS))

    def test_one_killed_in_mid_rollout_costs_its_answers_only(self, rollout, tokenizer, asked, capsys):
        """They are asked again of a process that takes its place, and the round is what it would have been."""
        long = SamplingParams(max_tokens=100, ignore_eos=True)
        rollout.refresh(4)
        first, second = rollout.pids()
        pending = rollout.begin(asked, long, copies=6, seed=1)
        time.sleep(0.05)
        os.kill(first, signal.SIGKILL)
        start = time.perf_counter()
        samples = pending()
        seconds = time.perf_counter() - start
        assert same(samples, local(rollout.model, tokenizer, asked, long, copies=6, seed=1))
        assert [s.notes.get("asked_again", 0) for s in samples] == [1] * 18 + [0] * 24
        assert rollout.lost == 18
        message = capsys.readouterr().err
        assert "rollout actor 0 died with 18 answers to 3 prompts under way" in message and message.count("died") == 1
        third, still = rollout.pids()
        assert still == second and third not in (first, second)
        os.kill(third, signal.SIGKILL)  # and one that has nothing to do
        assert same(rollout.write(asked, PARAMS, copies=3, seed=7), local(rollout.model, tokenizer, asked, PARAMS))
        with capsys.disabled():
            print(f"\n  an actor killed in mid-rollout: the round was whole {seconds:.1f} s later")

    def test_newer_weights_go_to_the_process_that_takes_a_dead_ones_place(self, rollout, tokenizer, asked):
        rollout.refresh(5)
        victim = rollout.pids()[1]
        pending = rollout.begin(asked, SamplingParams(max_tokens=100, ignore_eos=True), copies=6, seed=1)
        os.kill(victim, signal.SIGKILL)
        rollout.refresh(6)
        assert [s.version for s in pending()] == [5] * 18 + [6] * 24

    def test_a_mistake_is_one_paragraph(self, rollout, tokenizer):
        rollout.refresh(7)
        with pytest.raises(HanlinError, match=r"^[^\n]*$") as error:
            rollout.write([Prompt(tuple(range(5)) * 30, "long", {}, 0)], PARAMS, copies=1, seed=0)
        assert "150" in str(error.value)

    def test_only_this_machine_is_spoken_to(self, rollout):
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        peers = {c.raddr.ip.removeprefix("::ffff:") for one in family for c in one.net_connections("inet") if c.raddr}
        assert peers == {"127.0.0.1"}
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def goes_on(sample):
    """An environment."""
    return " = 12345;" if sample.length < 9 else None


def test_any_number_of_actors_and_turns(folder, tokenizer, asked):
    from hanlin.align.ray_rollout import RayRollout

    model = load_model(folder, dtype=torch.float32, device="cpu")
    params = SamplingParams(max_tokens=4, stop_token_ids=tuple(range(350)))
    turns = Turns(goes_on, 3)
    rollout = RayRollout(model, tokenizer, actors=3, threads=1, turns=turns, max_batch=8)
    rollout.refresh(0)
    samples = rollout.write(asked, params, copies=2, seed=5)
    rollout.close()
    assert same(samples, local(model, tokenizer, asked, params, copies=2, seed=5, turns=turns))
    assert not all(all(sample.written) for sample in samples), "at least one of them went on"


def rewards_of(recipe):
    train(recipe, quiet=True)
    rows = [row for row in read_metrics(recipe.out / "metrics.jsonl") if "reward" in row]
    return [row["reward"] for row in rows], rows


SEEDS, ROUNDS = (0, 1, 2), 30


def test_two_actors_learn_as_the_local_engine_does(folder, prompts, tmp_path, capsys):
    """Without a lag round by round the same; with a lag of 1 the mean reward of the last 10 of 30 rounds, over three
    seeds, is the local engine's to within two standard errors of the difference, and risen from where it began."""
    curves = {}
    for name, seeds, chosen in (
        ("local", SEEDS, {"kind": "local"}),
        ("ray", SEEDS[:1], {"kind": "ray", "actors": 2}),
        ("lag 1", SEEDS, {"kind": "ray", "actors": 2, "lag": 1}),
    ):
        for seed in seeds:
            recipe = rl_recipe(
                folder, prompts, tmp_path, name=f"{name} {seed}".replace(" ", "-"), train={"steps": ROUNDS}, answers=8,
                rollout=chosen,
            )  # fmt: skip
            curves[name, seed] = rewards_of(recipe.model_copy(update={"seed": seed}))
    assert curves["ray", 0][0] == pytest.approx(curves["local", 0][0], abs=1e-9)
    first, last, spread = {}, {}, {}
    for name in ("local", "lag 1"):
        ends = [statistics.mean(curves[name, seed][0][-10:]) for seed in SEEDS]
        first[name] = statistics.mean(value for seed in SEEDS for value in curves[name, seed][0][:5])
        last[name], spread[name] = statistics.mean(ends), statistics.stdev(ends)
    error = ((spread["local"] ** 2 + spread["lag 1"] ** 2) / len(SEEDS)) ** 0.5
    with capsys.disabled():
        for name in last:
            print(f"\n  {name}: {first[name]:.3f} -> {last[name]:.3f} (± {spread[name]:.3f} over seeds)", end="")
        print(f"; difference {last['lag 1'] - last['local']:+.3f}, its standard error {error:.3f}")
    assert all(last[name] > first[name] + 0.1 for name in last)
    assert abs(last["lag 1"] - last["local"]) <= 2 * error
    rows = curves["lag 1", 0][1]
    assert [row["rollout/lag"] for row in rows] == [0.0] + [1.0] * (ROUNDS - 1)
    assert rows[0]["rollout/weight"] == pytest.approx(1, abs=1e-5), "nothing is stale in the first round"
    assert max(abs(row["rollout/weight"] - 1) for row in rows[1:]) > 1e-4
