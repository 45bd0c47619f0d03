"""`hanlin train`: numbers that cannot be, and the command that continues a run."""

import json
import shlex
import sys

import pytest

from hanlin.cli import main
from hanlin.cli.train import COMMAND, _same_command
from hanlin.core.errors import HanlinError
from hanlin.core.launch import LAUNCHER, launch

RECIPE = """
name: small
tokenizer: nowhere
model: {kind: new, depth: 2, width: 64, heads: 2, kv_heads: 1, hidden: 64}
objective: {kind: causal_lm, shards: [{path: nowhere}], seq_len: 32}
train: {steps: 4, batch_size: 2, device: cpu}
"""


@pytest.mark.parametrize("flags", ["--nproc 2 --restarts -1", "--nproc 0", "--nproc -2", "--nproc two"])
def test_counts_that_cannot_be_are_refused(flags, capsys):
    assert main(["train", "recipe.yaml", *flags.split()]) == 2
    flag, _, found = flags.rpartition(" ")
    assert f"{flag.split()[-1]}: {found!r} is no whole number" in capsys.readouterr().err


def test_the_launcher_refuses_less_than_no_restart(tmp_path):
    with pytest.raises(HanlinError, match="0 or more; found -1"):
        launch(["true"], 1, logs=tmp_path, restarts=-1)


def test_the_workers_know_the_command_that_started_them(tmp_path, monkeypatch):
    """Each `hanlin train` of the launcher is replaced by a program that writes its environment down."""
    (tmp_path / "my recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(COMMAND, raising=False)
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os\njson.dump(dict(os.environ), open(os.environ['RANK'], 'w'))\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    argv = ["my recipe.yaml", "--nproc", "2", "--name", "a run"]
    assert main(["train", *argv]) == 0
    for rank in ("0", "1"):
        told = json.loads((tmp_path / rank).read_text())
        assert told[COMMAND] == "hanlin train 'my recipe.yaml' --nproc 2 --name 'a run'"
        assert shlex.split(told[COMMAND])[2:] == argv and LAUNCHER in told


def test_a_stopped_run_names_what_continues_it(monkeypatch):
    for name in (LAUNCHER, COMMAND):
        monkeypatch.delenv(name, raising=False)
    assert _same_command(["my recipe.yaml"], 1) == "hanlin train 'my recipe.yaml'"
    by_torchrun = _same_command(["recipe.yaml"], 8)  # whose own command line is not known here
    assert by_torchrun == "start it again with the same launcher"
    monkeypatch.setenv(LAUNCHER, "1")
    monkeypatch.setenv(COMMAND, "hanlin train recipe.yaml --nproc 8")
    assert _same_command(["recipe.yaml"], 8) == "hanlin train recipe.yaml --nproc 8"
