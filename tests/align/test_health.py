"""The monitor of alignment runs: quiet on healthy noisy runs, one sentence a trouble, the same after a restart."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.align.made_up_runs import on_policy_rows, preference_rows, write_run, write_samples
from tests.align.on_policy_cases import model_folder, prompt_file, rl_recipe

from hanlin.align.build import train
from hanlin.align.health import Health, read_samples, watch_of
from hanlin.align.health_conditions import Found
from hanlin.align.health_panels import PANELS
from hanlin.align.health_report import health_report, write_health
from hanlin.align.health_rules import RULES, Rule
from hanlin.align.methods import METHODS
from hanlin.align.on_policy_recipe import OnPolicyObjective
from hanlin.align.preference_recipe import PreferenceObjective
from hanlin.cli import main
from hanlin.train.history import read_run
from hanlin.train.settings import TrainSettings


def put(**changes):
    """A change of lines: from step 40 on these values, numbers or functions of (steps since, value, chance)."""

    def change(step, row, chance):
        for name, value in changes.items():
            key = name.replace("__", "/")
            if key in row and step >= 40:
                row[key] = value(step - 40, row[key], chance) if callable(value) else value

    return change


TROUBLES = {
    "entropy": put(entropy=lambda t, v, c: v * 2.718 ** (-t / 8)),
    "too easy": put(groups__silent=lambda t, v, c: c.uniform(0.85, 1), reward=lambda t, v, c: c.uniform(0.9, 1)),
    "too hard": put(groups__silent=lambda t, v, c: c.uniform(0.85, 1), reward=lambda t, v, c: c.uniform(0, 0.1)),
    "truncated": put(answer__truncated=lambda t, v, c: c.uniform(0.6, 0.9), answer__ended=0.2),
    "no end": put(answer__truncated=1.0, answer__ended=0.0),
    "empty": put(answer__empty=0.6),
    "length": put(
        answer__length=lambda t, v, c: v * (1 + t / 20), reward=lambda t, v, c: 0.3 + c.gauss(0, 0.04),
    ),
    "reference": put(kl__k1=lambda t, v, c: v + 0.02 * t),
    "mismatch": put(rollout__mismatch_p95=lambda t, v, c: c.uniform(0.15, 0.4)),
    "clipped": put(clip_low=lambda t, v, c: c.uniform(0.1, 0.2), clip_high=lambda t, v, c: c.uniform(0.2, 0.4)),
    "gradient": put(grad_norm=lambda t, v, c: 30 * v if t == 7 else v),
    "no progress": lambda step, row, c: row.update(reward=0.3 + c.gauss(0, 0.05)) if "reward" in row else None,
    "critic": put(explained_variance=lambda t, v, c: c.gauss(-0.5, 0.2)),
    "forgetting": put(eval_text__loss=lambda t, v, c: v + 0.004 * t),
    "hacking": put(eval__sampled=lambda t, v, c: 0.8 - t / 300, reward=lambda t, v, c: min(1.0, 0.5 + t / 300)),
    "held out": put(eval__greedy=lambda t, v, c: max(0.0, 0.12 + c.gauss(0, 0.02))),
    "both fall": lambda step, row, c: row.update(
        {"rewards/chosen": -0.05 * step, "rewards/rejected": -0.08 * step} if "rewards/chosen" in row else {}
    ),
    "at once": lambda step, row, c: row.update({"rewards/accuracy": 1.0} if step > 3 else {}),
    "overfitting": put(eval__loss=lambda t, v, c: v + 0.01 * t),
}  # fmt: skip
OF_PAIRS = ("both fall", "at once", "overfitting")


def troubled(name, seed):
    rows = preference_rows if name in OF_PAIRS else on_policy_rows
    return list(rows(seed, change=TROUBLES[name]))


def test_every_rule_has_its_trouble():
    assert {rule.name for rule in RULES} == set(TROUBLES)


@pytest.mark.parametrize("name", TROUBLES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rule_speaks_of_its_trouble_within_few_words(name, seed):
    health = Health.over(troubled(name, seed))
    own = [alarm for alarm in health.alarms if alarm.rule.name == name]
    assert 1 <= len(own) <= 5, [alarm.text for alarm in health.alarms]
    assert "nan" not in own[0].text and own[0].text.endswith(".")
    assert own[0].step > (0 if name in ("no progress", "both fall", "at once") else 39)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_healthy_noisy_run_raises_no_alarm(seed):
    assert [alarm.text for alarm in Health.over(on_policy_rows(seed, 100)).alarms] == []
    assert [alarm.text for alarm in Health.over(preference_rows(seed, 60)).alarms] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_three_hundred_healthy_runs_raise_no_alarm(block):
    for seed in range(30 * block, 30 * block + 30):
        assert [alarm.text for alarm in Health.over(on_policy_rows(seed, 300)).alarms] == []
        assert [alarm.text for alarm in Health.over(preference_rows(seed, 200)).alarms] == []


def constant(count=60, **values):
    """Lines on which these metrics stand still."""
    return [{"step": step, **{key.replace("__", "/"): value for key, value in values.items()}} for step in range(count)]


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        (constant(groups__silent=0.79, reward=0.9), constant(groups__silent=0.81, reward=0.9)),
        (constant(answer__truncated=0.49), constant(answer__truncated=0.51)),
        (constant(answer__ended=0.01), constant(answer__ended=0.0)),
        (constant(answer__empty=0.29), constant(answer__empty=0.31)),
        (constant(rollout__mismatch_p95=0.099), constant(rollout__mismatch_p95=0.101)),
        (constant(clip_low=0.14, clip_high=0.15), constant(clip_low=0.15, clip_high=0.16)),
        (constant(grad_norm=1) + constant(1, grad_norm=9.9), constant(grad_norm=1) + constant(1, grad_norm=11)),
        (constant(19, explained_variance=-1), constant(20, explained_variance=-1)),
        (constant(entropy=1) + constant(3, entropy=0.21), constant(entropy=1) + constant(3, entropy=0.19)),
        (constant(rewards__accuracy=0.998), constant(rewards__accuracy=1)),
    ],
)  # fmt: skip
def test_a_rule_begins_at_its_limit(within, beyond):
    """Lines are numbered anew: what is put together goes on."""
    for rows, count in ((within, 0), (beyond, 1)):
        health = Health.over({**row, "step": step} for step, row in enumerate(rows))
        assert len(health.alarms) == count, [alarm.text for alarm in health.alarms]


def test_one_outlier_is_no_alarm_and_one_leap_of_the_gradient_is():
    rows = constant(60, rollout__mismatch_p95=0.01, answer__truncated=0.1, entropy=1.0, grad_norm=1.0)
    rows[40] |= {"rollout/mismatch_p95": 5.0, "answer/truncated": 1.0, "entropy": 1e-3}
    assert Health.over(rows).alarms == []
    rows[41] |= {"grad_norm": 50.0}
    (alarm,) = Health.over(rows).alarms
    assert alarm.step == 41 and "50 times its median" in alarm.text


def test_silent_groups_are_told_apart_by_the_reward():
    for name, words in (("too easy", "harder prompts"), ("too hard", "easier prompts")):
        said = [alarm.text for alarm in Health.over(troubled(name, 0)).alarms]
        assert any(words in text for text in said), said


def test_an_alarm_is_said_once_then_when_worse_and_when_it_comes_back():
    health = Health()

    def show(mismatch, steps):
        for _ in range(steps):
            show.step += 1
            if health.look({"step": show.step, "rollout/mismatch_p95": mismatch}):
                yield show.step

    show.step = 0
    assert list(show(0.01, 20)) == []
    assert len(list(show(0.2, 40))) == 1
    assert list(show(0.3, 20)) == []  # half as much again is not twice
    assert len(list(show(0.5, 20))) == 1
    assert list(show(0.01, 8)) == []
    assert list(show(0.2, 20)) == []  # it was not away for ten lines
    assert list(show(0.01, 20)) == []
    assert len(list(show(0.2, 20))) == 1


@pytest.mark.parametrize("name", ["entropy", "hacking", "no progress", "gradient"])
@pytest.mark.parametrize("cut", [30, 57, 90])
def test_a_run_that_goes_on_says_what_the_uninterrupted_one_says(tmp_path, name, cut):
    """Killed after more lines than its newest checkpoint has; the lines past it are written again."""
    rows = json.loads(json.dumps(troubled(name, 4)))
    whole = [alarm.text for alarm in Health.over(rows).alarms]
    until = next(i for i, row in enumerate(rows) if row["step"] > cut)
    run = write_run(tmp_path / "run", rows[: until + 5])
    run.checkpoint(cut).mkdir()
    resumed = Health.resumed(run)
    said = [alarm.text for alarm in resumed.alarms]
    watch = watch_of(run)
    assert said + [text for row in rows[until:] for text in watch(row)] == whole and whole


def test_without_a_checkpoint_a_run_begins_anew(tmp_path):
    run = write_run(tmp_path / "run", troubled("entropy", 0))
    assert Health.resumed(run).alarms == [] and Health.resumed(run).seen.lines == {}


def test_what_a_rollback_took_back_is_forgotten():
    rows = troubled("mismatch", 0)
    health = Health.over(rows)
    assert any(alarm.rule.name == "mismatch" for alarm in health.alarms)
    health.look({"step": 20, "rollout/mismatch_p95": 0.004})
    assert health.alarms == [] and health.seen.count("rollout/mismatch_p95") == 20
    again = [text for row in rows if row["step"] > 20 for text in health.look(row)]
    assert len(again) == 1


def test_odd_lines_do_no_harm():
    health = Health()
    for row in ({}, {"step": 1}, {"step": 2, "entropy": float("nan"), "reward": None, "x": "y", "alarms": ["z"]}):
        assert health.look(row) == []
    assert health.look({"step": 3, "grad_norm": float("inf"), "groups/silent": True}) == []
    assert set(health.seen.lines) == {"step"}


def test_a_rule_of_ones_own_is_one_row():
    def slow(seen, metric, rows):
        values = seen.last(metric, rows)
        return Found(1.0, {"now": values[-1]}) if values[-1] < 10 else None

    health = Health((*RULES, Rule("slow", "tokens_per_s", 1, slow, "only {now:.0f} of {metric}.")))
    assert health.look({"step": 1, "tokens_per_s": 3}) == ["only 3 of tokens_per_s."]


def test_what_a_sentence_advises_is_in_the_recipe():
    known = {"objective": OnPolicyObjective.model_fields.keys() | PreferenceObjective.model_fields.keys()}
    known["train"] = TrainSettings.model_fields.keys()
    for rule in RULES:
        for section, field in re.findall(r"\b(objective|train)\.(\w+)", rule.sentence):
            assert field in known[section], (rule.name, section, field)
        assert rule.sentence.endswith(".")


# --- the page of a finished run ---


def colours(file):
    with Image.open(file) as image:
        found = image.convert("RGB").getcolors(2**24)
        return image.size, {colour for _, colour in found}


def test_every_metric_that_a_rule_looks_at_is_on_a_panel():
    for rule in RULES:
        assert any(panel.shows(rule.metric) for panel in PANELS), rule.metric
    assert not any(panel.shows("reward/std") for panel in PANELS)


def test_a_figure_has_the_panels_of_its_run_and_alarms_are_red(tmp_path):
    loud = write_run(tmp_path / "loud", troubled("mismatch", 1))
    pairs = write_run(tmp_path / "pairs", list(preference_rows(1, 30)), rounds=0, kind="dpo")
    for run in (loud, pairs):
        write_health(run)
    (_, tall), found = colours(loud.path / "health.png")
    (_, short), plain = colours(pairs.path / "health.png")

    def reds(colours):
        return [colour for colour in colours if colour[0] > 150 > 90 > max(colour[1:])]

    assert tall > 2 * short and reds(found) and not reds(plain)


def test_stages_of_a_round_are_on_top_of_one_another():
    from hanlin.align.health_panels import filled

    found = filled({"a": [(1, 2.0), (2, 3.0)], "b": [(2, 1.0)]})
    assert found == {"a": [(1, 2.0), (2, 3.0)], "b": [(1, 0.0), (2, 1.0)]}


def report_of(run):
    history = read_run(run.path)
    alarms = Health.over(history.rows).alarms
    return health_report(history, alarms, read_samples(run.path / "samples.jsonl")), alarms


def test_the_report_has_bold_alarms_and_answers_of_both_ends(tmp_path):
    run = write_run(tmp_path / "run", troubled("entropy", 2))
    report, alarms = report_of(run)
    assert f"- **Step {alarms[0].step:g}: entropy fell by" in report and "![Health](health.png)" in report
    assert "on-policy: each answer is learnt from once" in report
    rows = [line for line in report.splitlines() if line.startswith("| 0 | What")]
    cells = re.split(r"(?<!\\) \| ", rows[0].strip("| "))
    assert len(cells) == 8 and int(cells[4]) >= 9
    assert "\\<b>no\\</b> idea" in report and "几？" in report and "\\*\\*" in report
    assert "**" not in cells[2] + cells[6]


def test_clipping_is_no_bug_where_there_is_none(tmp_path):
    clipping = write_run(tmp_path / "run", list(on_policy_rows(1, 60, change=put(clip_high=0.05))))
    assert "on-policy" not in report_of(clipping)[0]


def test_samples_of_rounds_that_were_written_again_stand_once(tmp_path):
    file = tmp_path / "samples.jsonl"
    assert read_samples(file) == []
    write_samples(file, 4)
    write_samples(file, 3, first=2)  # killed, and gone on from round 2
    with file.open("a") as stream:
        stream.write('{"round": 5, "prom')
    found = read_samples(file)
    assert [row["round"] for row in found] == [n for n in range(5) for _ in range(3)]


def test_runs_show_writes_the_health_of_a_run(tmp_path, capsys):
    kept = ("step", "answer/ended", "reward")
    rows = [{key: row[key] for key in kept if key in row} for row in troubled("no end", 0)]
    run = write_run(tmp_path / "run", rows)
    assert main(["runs", "show", str(run.path), "--health"]) == 0
    out = capsys.readouterr().out
    assert "no answer ends by itself" in out and "health.png" in out
    assert (run.path / "health.png").is_file() and (run.path / "report.md").is_file()
    assert main(["runs", "show", str(run.path), "--health", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["name"] == "run"
    assert main(["runs", "watch", str(tmp_path / "none")]) == 2 and "no folder" in capsys.readouterr().err


def test_a_run_without_numbers_yet_has_a_report(tmp_path):
    run = write_run(tmp_path / "run", [], rounds=0)
    write_health(run)
    assert "No alarm" in (run.path / "report.md").read_text()


def test_a_real_run_is_watched_and_has_its_page(tmp_path, tokenizer, monkeypatch):
    """A random model's answers of five tokens are nearly all cut off, which is said while it learns."""
    method = METHODS[OnPolicyObjective]

    def wire(parts):
        return replace(method.wire(parts), watch=watch_of(parts.run), finish=partial(write_health, parts.run))

    monkeypatch.setitem(METHODS, OnPolicyObjective, replace(method, wire=wire))
    model, prompts = model_folder(tmp_path / "model", tokenizer), prompt_file(tmp_path / "prompts.jsonl")
    recipe = rl_recipe(model, prompts, tmp_path / "runs", train={"steps": 6})
    assert train(recipe, quiet=True).finished
    run = read_run(recipe.out)
    said = [alarm for row in run.rows for alarm in row.get("alarms", [])]
    assert said == [alarm.text for alarm in Health.over(run.rows).alarms]
    assert any("end token is never written" in text or "cut off" in text for text in said)
    report = (recipe.out / "report.md").read_text(encoding="utf-8")
    assert f"**Step 5: {said[0][:40]}" in report and "## Answers" in report
    assert (recipe.out / "health.png").is_file()
