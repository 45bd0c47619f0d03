"""`metrics.jsonl`: append-only, each step once after a resume, readable with a torn last line."""

import json

from hypothesis import given
from hypothesis import strategies as st

from hanlin.core.metrics import MetricsFile, read_metrics


def written(path, steps, resume_step=None):
    file = MetricsFile(path, resume_step=resume_step)
    for step in steps:
        file.write({"step": step, "loss": 1 / step, "文": "语"})
    file.close()


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_a_torn_last_line_is_left_out_and_dropped_on_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    written(path, [1, 2, 3])
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_bytes(whole[: -1 - cut])
        assert steps(path) == [1, 2]
    written(path, [3, 4], resume_step=2)
    assert steps(path) == [1, 2, 3, 4]


def test_lines_past_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 8))
    written(path, [5, 6], resume_step=4)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    written(path, [1])
    assert steps(path) == [1], "no resume: an empty file"


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    assert steps(path) == [1]
    file.close()


def test_no_nan_reaches_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": float("nan"), "lr": float("inf"), "mfu": 0.5})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": None, "lr": None, "mfu": 0.5}]


def test_a_missing_file_is_empty(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


@given(st.lists(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.text())))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file = MetricsFile(path)
    for row in rows:
        file.write(row)
    file.close()
    assert read_metrics(path) == rows
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == rows
