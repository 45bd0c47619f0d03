"""The README's commands are run, in its order, in a fresh copy of the tracked files, so that they cannot rot.

Every fenced block names its language. `bash` blocks are commands: each line must run as it stands or be one of the few
that the table below runs in a smaller or bounded form. Nothing else may hold a command: an unlabelled block is refused.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [page for page in ("README.md", "README.zh.md") if (ROOT / page).exists()]
LANGUAGES = {"bash", "text", "yaml", "json", "python"}
SMALLEST = "--minutes 0.5 --text sample.txt"

# Commands that are run in another form: the same command, smaller, or only resolved because this test is inside it.
INSTEAD = {
    "make test": "make -n test",
    "make test-slow": "make -n test-slow",
    "make bench": "make -n bench",
    "make clean": "make -n clean",
    "hanlin quickstart --no-serve": f"hanlin quickstart --no-serve {SMALLEST}",
}
# Commands that do not end: started on a free port, asked for their page and health, stopped with Ctrl-C.
SERVERS = {
    r"make quickstart": f"make quickstart ARGS='{SMALLEST} --port 0'",
    r"hanlin quickstart": f"hanlin quickstart {SMALLEST} --port 0",
    r"hanlin serve \S+": r"\g<0> --port 0",
}
TYPED = {"hanlin chat": "Who are you?\n你是谁？\n"}  # what is typed into a command that reads


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def fenced_blocks(text: str) -> list[Block]:
    """Every ``` or ~~~ block of a Markdown page, indented ones too."""
    blocks, opened = [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*(```+|~~~+)\s*(.*)", line)
        if opened is None and fence:
            opened = (fence[1], fence[2].strip(), number, [])
        elif opened is not None and fence and fence[1].startswith(opened[0]) and not fence[2].strip():
            blocks.append(Block(opened[1], "\n".join(opened[3]), opened[2]))
            opened = None
        elif opened is not None:
            opened[3].append(line)
    assert opened is None, f"the block of line {opened[2]} is never closed"
    return blocks


def commands_of(text: str) -> list[str]:
    """The commands of all bash blocks in order; comments dropped, continued lines joined."""
    joined = "\n".join(block.text for block in fenced_blocks(text) if block.language == "bash").replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#\s.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def server_form(command: str) -> str | None:
    for pattern, form in SERVERS.items():
        if re.fullmatch(pattern, command):
            return re.sub(pattern, form, command)
    return None


# --- fast: the page's form


def test_blocks_are_found_wherever_they_hide():
    page = "x\n```bash\nmake a  # why\n# only a comment\nb \\\n  c\n```\n- y\n  ~~~sh\n  d\n  ~~~\n```\ne\n```\n"
    assert [(block.language, block.line) for block in fenced_blocks(page)] == [("bash", 2), ("sh", 9), ("", 12)]
    assert commands_of(page) == ["make a", "b    c"]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_a_language_that_is_checked(page):
    wrong = [
        f"{page}:{b.line} ({b.language or 'none'})" for b in fenced_blocks(text_of(page)) if b.language not in LANGUAGES
    ]
    assert not wrong, f"commands belong in ```bash, what they print in ```text: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_a_text_block(page):
    for block in fenced_blocks(text_of(page)):
        if block.language == "text":
            hidden = re.findall(r"^\s*(?:\$\s*)?(?:make|hanlin|pip|python3?|curl|git) .*", block.text, re.MULTILINE)
            assert not hidden, f"{page}:{block.line}: {hidden}"


def test_the_readme_begins_with_the_two_commands():
    assert commands_of(text_of("README.md"))[:2] == ["make quickstart", "make test"]


def test_make_test_is_what_ci_runs():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    listed = subprocess.run(["make", "-n", "test"], cwd=ROOT, env=plain_environment(), capture_output=True, text=True)
    assert re.search(r"pytest .*not slow", listed.stdout), listed.stdout + listed.stderr


# --- slow: the commands


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, own_words):
    """A copy of the tracked files beside this environment, and a small text of its own."""
    environment = Path(sys.prefix)
    if not all((environment / stamp).exists() for stamp in (".torch", ".quickstart", ".dev")):
        pytest.skip("this environment was not made by `make`: make would install one")
    folder = tmp_path_factory.mktemp("readme") / "hanlin"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(environment)
    for name in (
        "constraints.txt",
        "pyproject.toml",
    ):  # older than the stamps: make must use this environment as it is,
        os.utime(folder / name, (0, 0))  # for an install from here would point it at this copy
    for target in ("quickstart", "test"):
        planned = subprocess.run(
            ["make", "-n", target], cwd=folder, env=plain_environment(), capture_output=True, text=True
        )
        assert "install" not in planned.stdout, planned.stdout
    (folder / "sample.txt").write_text(own_words, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(page, checkout):
    failed = []
    for command in commands_of(text_of(page)):
        server = server_form(command)
        problem = probe_server(server, checkout) if server else run(INSTEAD.get(command, command), checkout)
        if problem:
            failed.append(f"$ {command}\n{problem}")
    for block in fenced_blocks(text_of(page)):
        if block.language == "python":
            problem = run(f"python -c {shlex.quote(block.text)}", checkout)
            if problem:
                failed.append(f"{page}:{block.line}\n{problem}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
def test_a_second_call_starts_at_once(checkout):
    """make's own part, with the environment there: under 3 seconds."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        problem = run("make quickstart ARGS=--help", checkout)
        best = min(best, time.perf_counter() - started)
        assert not problem
    assert best < 3.0


def run(command: str, folder: Path) -> str:
    """What went wrong, or nothing."""
    typed = next((text for start, text in TYPED.items() if command.startswith(start)), "")
    try:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=plain_environment(),
            input=typed,
            capture_output=True,
            text=True,
            timeout=1200,
        )
    except subprocess.TimeoutExpired:
        return "did not end in 20 minutes (a server belongs into SERVERS)"
    return "" if done.returncode == 0 else f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def probe_server(command: str, folder: Path) -> str:
    """Start it, wait for its address, ask for health and the page, stop it as a person would."""
    log = folder / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = wait_for_address(process, log, seconds=1200)
        if address is None:
            return f"never served\n{log.read_text()[-4000:]}"
        for path in ("/health", "/"):
            with urllib.request.urlopen(address + path, timeout=60) as answer:
                if answer.status != 200:
                    return f"{path} answered {answer.status}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return ""


def wait_for_address(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"Serving .* at (http://\S+)", log.read_text())
        if found:
            return found[1].rstrip("/")
        time.sleep(0.5)
    return None


def plain_environment() -> dict[str, str]:
    """This environment without the outer make's and pytest's settings; its commands first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTEST"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
