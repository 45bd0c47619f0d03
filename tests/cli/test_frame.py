"""The command line's frame: a table of verbs, quick help, one clear paragraph for a mistake."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

import hanlin
from hanlin.cli import VERBS, main
from hanlin.cli.parser import make_parser
from hanlin.cli.schema import RECIPES
from hanlin.core.errors import HanlinError

HEAVY = {"torch", "numpy", "transformers", "tokenizers", "pydantic", "tyro", "rich", "yaml", "matplotlib", "fastapi"}


def hanlin_command(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hanlin", *argv], capture_output=True, text=True, **options)


def best_seconds(*command: str, tries: int = 5) -> float:
    """The fastest of several runs of a whole process: another process can only make one slower."""
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - started)
    return best


def test_import_hanlin_takes_less_than_300_ms():
    assert best_seconds(sys.executable, "-c", "import hanlin") < 0.3


def test_help_takes_less_than_500_ms():
    assert best_seconds(sys.executable, "-m", "hanlin", "--help") < 0.5


@pytest.mark.parametrize("command", [["-c", "import hanlin"], ["-m", "hanlin", "--help"]])
def test_nothing_heavy_is_imported(command):
    """The robust form of the two claims above: what costs time is not there."""
    traced = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in traced.stderr.splitlines()}
    assert "hanlin" in imported
    assert not imported & HEAVY


def test_help_lists_every_verb(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in VERBS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hanlin {hanlin.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    assert f"hanlin {verb}" in capsys.readouterr().out


def test_an_unknown_verb_names_its_neighbour(capsys):
    assert main(["tran"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hanlin: Unknown command `tran`. Did you mean `train`? The commands are: quickstart,")
    assert main(["翰林"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_an_expected_error_is_a_paragraph_and_exit_2():
    done = hanlin_command("train", "missing.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("hanlin: There is no recipe missing.yaml.")
    assert "Traceback" not in done.stderr


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    module = importlib.import_module("hanlin.cli.schema")
    monkeypatch.setattr(module, "main", lambda argv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["schema"])


def test_a_file_that_may_not_be_read_is_explained(monkeypatch, capsys):
    module = importlib.import_module("hanlin.cli.schema")

    def refuse(argv: list[str]) -> None:
        raise PermissionError(13, "Permission denied", "secret.txt")

    monkeypatch.setattr(module, "main", refuse)
    assert main(["schema"]) == 2
    assert capsys.readouterr().err == "hanlin: secret.txt could not be opened or written: Permission denied.\n"


def test_ctrl_c_is_130_without_a_traceback():
    code = (
        "import sys, time, hanlin.cli.schema as verb\n"
        "verb.main = lambda argv: (print('ready', flush=True), time.sleep(60))\n"
        "from hanlin.cli import main; sys.exit(main(['schema']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "\nInterrupted.\n"


def test_a_closed_pipe_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "hanlin", "schema", "train"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert process.stderr == ""
    assert process.returncode == 141


# --- the parser of simple verbs


def test_a_wrong_flag_names_its_neighbour():
    parser = make_parser("demo", "A demonstration.")
    parser.add_argument("--vocab-size", type=int)
    with pytest.raises(HanlinError, match=r"Unrecognized arguments: --vocab-sise 3\. Did you mean `--vocab-size`\?"):
        parser.parse_args(["--vocab-sise", "3"])
    with pytest.raises(HanlinError, match=r"Argument --vocab-size: invalid int value: 'x'\.\nusage: hanlin demo"):
        parser.parse_args(["--vocab-size", "x"])
    with pytest.raises(HanlinError, match="Unrecognized arguments: --vocab"):
        parser.parse_args(["--vocab", "3"])  # no abbreviations: a later flag would change what they mean


def test_every_parser_has_quiet_and_shows_examples():
    parser = make_parser("demo", "A demonstration.", examples=["hanlin demo 一"])
    assert parser.parse_args(["--quiet"]).quiet is True
    assert "examples:\n  hanlin demo 一" in parser.format_help()


# --- schemas


@pytest.mark.parametrize("name", RECIPES)
def test_the_schema_of_every_recipe_is_a_schema(name, capsys):
    import json

    assert main(["schema", name]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["properties"]


def test_an_unknown_schema_names_its_neighbour(capsys):
    assert main(["schema", "trian"]) == 2
    assert "There is no recipe called `trian`. Did you mean `train`?" in capsys.readouterr().err
