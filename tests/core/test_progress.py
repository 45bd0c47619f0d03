"""Progress: a bar on a terminal, plain lines in a log, nothing when quiet."""

import io
import time

import pytest

from hanlin.core.progress import Progress, amounts, clock, quantity, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_with_rate_time_left_and_values():
    log = io.StringIO()
    with Progress("pretrain", total=100, unit="steps", stream=log, log_every=0.0) as bar:
        for _ in range(2):
            time.sleep(0.02)
            bar.advance(20, loss=2.34567, lr=1e-3, note="好")
    first, second, last = log.getvalue().splitlines()
    assert first.startswith("pretrain      20 / 100 steps (20%)  ")
    assert "steps/s" in first
    assert " left  loss 2.346  lr 0.001  note 好" in first
    assert "40 / 100 steps (40%)" in second
    assert "done in" in last
    assert "\x1b" not in log.getvalue()
    assert "\r" not in log.getvalue()


def test_a_log_is_not_flooded():
    log = io.StringIO()
    with Progress("tokenise", stream=log) as bar:
        for _ in range(1000):
            bar.advance(1)
    assert len(log.getvalue().splitlines()) == 1


def test_quiet_is_silent(capsys):
    log = io.StringIO()
    with Progress("x", total=1, quiet=True, stream=log, log_every=0.0) as bar:
        bar.advance(1)
    say("words", quiet=True)
    assert log.getvalue() == capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar():
    terminal = Terminal()
    with Progress("pretrain", total=100, unit="steps", stream=terminal) as bar:
        bar.advance(100, loss=[1])
    assert "━" in terminal.getvalue()
    assert "100 / 100 steps (100%)" in terminal.getvalue()
    assert "loss [1]" in terminal.getvalue(), "brackets are text, not rich's markup"


def test_an_error_inside_is_not_called_done():
    log = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("x", stream=log) as bar:
        bar.advance(1)
        raise ZeroDivisionError
    assert "stopped after" in log.getvalue()


def test_what_a_resumed_run_had_done_does_not_count_as_speed():
    bar = Progress("x", total=1000, done=900, quiet=True)
    time.sleep(0.05)
    bar.advance(1)
    assert 0 < bar.rate < 25
    assert bar.seconds_left == pytest.approx(99 / bar.rate)
    assert Progress("x").seconds_left is None


def test_say_goes_to_stderr(capsys):
    say("你好")
    assert capsys.readouterr() == ("", "你好\n")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (0.3131, "0.313"), (512, "512"), (2048, "2.05k"), (17_500_000, "17.5M"), (999_960, "1M")],
)
def test_quantities_are_short(number, text):
    assert quantity(number) == text


def test_times_and_amounts_read_well():
    assert [clock(s) for s in (1.23, 42, 185, 3723)] == ["1.2 s", "42 s", "3:05", "1:02:03"]
    assert amounts(3, None, "MB") == "3 MB"
    assert amounts(0, 0, "files") == "0 / 0 files"
