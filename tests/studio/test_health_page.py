"""Chromium looks at the health page of made-up runs while they grow; what it reads without a browser."""

import contextlib
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest
from tests.align.made_up_runs import on_policy_rows, preference_rows, write_run, write_samples

from hanlin.align.health import Alarm, Found
from hanlin.align.health_panels import PANELS
from hanlin.align.health_rules import RULES
from hanlin.core.metrics import MetricsFile
from hanlin.studio.followed_run import FollowedRun, run_folders
from hanlin.studio.health_page import chart_options
from hanlin.studio.health_words import ALARMS_ZH, PANELS_ZH, ZERO_ZH, alarm_text


def mismatch(step, row, chance):
    if "rollout/mismatch_p95" in row and step > 30:
        row["rollout/mismatch_p95"] = 0.3


def append(run, rows):
    with run.metrics.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


# --- without a browser ---


def test_all_words_are_there_in_chinese_with_the_same_figures():
    assert set(ALARMS_ZH) == {rule.name for rule in RULES}
    assert set(PANELS_ZH) == {panel.title for panel in PANELS}
    assert set(ZERO_ZH) == {panel.zero for panel in PANELS if panel.zero}

    def figures(text):
        return {(name, form) for _, name, form, _ in string.Formatter().parse(text) if name}

    for rule in RULES:
        assert figures(ALARMS_ZH[rule.name]) == figures(rule.sentence), rule.name
        named = set(re.findall(r"\b(?:objective|train)\.\w+", rule.sentence))
        assert named == set(re.findall(r"(?:objective|train)\.\w+", ALARMS_ZH[rule.name])), rule.name


def test_an_alarm_is_told_in_both_languages():
    rule = next(rule for rule in RULES if rule.name == "truncated")
    alarm = Alarm(rule, 3, Found(1.0, {"now": 0.7, "percent": 70.0}))
    assert alarm_text(alarm, "en").startswith("70 % of the answers") and alarm_text(alarm, "zh").startswith(
        "70 % 的回答"
    )


def test_a_followed_run_reads_what_is_new_and_goes_back_with_it(tmp_path):
    rows = list(on_policy_rows(3, 60, change=mismatch))
    early = [row for row in rows if row["step"] <= 20]
    run = write_run(tmp_path / "run", early)
    followed = FollowedRun(run.path)
    assert followed.alarms == [] and followed.state == "running" and not followed.read()
    append(run, rows[len(early) :])
    assert followed.read() and [alarm.rule.name for alarm in followed.alarms] == ["mismatch"]
    write_samples(run.path / "samples.jsonl", 1, first=12)
    assert followed.read() and followed.samples[-1]["round"] == 12
    MetricsFile(run.metrics, resume_step=20).close()  # it goes on from a checkpoint
    assert followed.read() and followed.alarms == [] and followed.history.last("step") == 20
    run.model.mkdir()
    assert followed.read() and followed.state == "finished"


def test_the_newest_run_is_the_first(tmp_path):
    for age, name in enumerate(("new", "deep/old")):
        run = write_run(tmp_path / name, [])
        os.utime(run.metrics, (time.time() - age * 100,) * 2)
    assert list(run_folders(tmp_path)) == ["new", "deep/old"]
    assert list(run_folders(tmp_path / "new")) == ["new"]


def test_a_chart_has_alarms_limits_and_at_most_so_many_points():
    panel = next(panel for panel in PANELS if panel.title == "rollout against trainer, nats")
    curve = [(float(i), 0.01) for i in range(5000)]
    options = chart_options(panel, {"rollout/mismatch_p95": curve}, [40.0], "en")
    marks = options["series"][0]["markLine"]["data"]
    assert marks[0]["xAxis"] == 40.0 and marks[1]["yAxis"] == 0.1
    assert len(options["series"][0]["data"]) == 300 and json.dumps(options)
    clip = next(panel for panel in PANELS if panel.zero)
    silent = chart_options(clip, {"clip_low": [(1, 0.0)], "clip_high": [(1, 0.0)]}, [], "zh")
    assert silent["title"]["show"] and "在策略" in silent["title"]["text"] and not silent["legend"]["show"]


# --- with one ---


@contextlib.contextmanager
def watching(folder):
    """`hanlin runs watch` in a process of its own; gives its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hanlin", "runs", "watch", str(folder), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    lines = []
    try:
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield re.search(r"http://\S+", lines[0])[0]
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest and "Warning" not in rest, rest


@pytest.mark.browser
def test_the_page_follows_a_run_in_both_languages(browser, tmp_path):
    rows = list(on_policy_rows(3, 60, change=mismatch))
    early = [row for row in rows if row["step"] <= 20]
    write_run(tmp_path / "pairs", list(preference_rows(1, 30)), rounds=0, kind="dpo")
    os.utime(tmp_path / "pairs" / "metrics.jsonl", (time.time() - 1000,) * 2)
    run = write_run(tmp_path / "sums", early, rounds=2)
    complaints = []
    with watching(tmp_path) as address:
        context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else complaints.append(r.url)
        )
        page.goto(address)
        page.wait_for_selector(".hl-panel canvas")
        assert "step 20 / 200 · running" in page.locator(".hl-run-state").text_content()
        assert page.locator(".hl-calm").text_content() == "No alarm."
        assert page.locator(".hl-panel").count() == 15
        assert page.locator(".hl-answers-table td").nth(2).text_content() == "<b>no</b>\nidea"  # text, not HTML

        append(run, rows[len(early) :])
        write_samples(run.path / "samples.jsonl", 1, first=30)
        page.wait_for_selector(".hl-alarm", timeout=15_000)
        assert "95th percentile" in page.locator(".hl-alarm").text_content()
        assert "step 60" in page.locator(".hl-run-state").text_content()
        assert page.locator(".hl-answers-table td").first.text_content() == "30"

        page.get_by_role("button", name="切换到中文").click()
        page.wait_for_selector(".hl-panel-title:has-text('熵')")
        assert "第 95 百分位" in page.locator(".hl-alarm").text_content()

        page.get_by_label("训练").first.click()
        page.get_by_role("option", name="pairs").click()
        page.wait_for_selector(".hl-panel-title:has-text('偏好对')")
        assert page.locator(".hl-panel-title:has-text('熵')").count() == 0
        assert "两分钟没有新内容" in page.locator(".hl-run-state").text_content()

        shutil.rmtree(tmp_path / "pairs")  # what is gone does not break the page
        page.wait_for_timeout(2500)
        page.reload()
        page.wait_for_selector(".hl-panel-title:has-text('熵')")
        context.close()
    assert complaints == []
