import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from tests.serve.tiny import make_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Room for a long answer, so that there is time to stop it."""
    return make_folder(tmp_path_factory.mktemp("models") / "tiny", context=100_000)


@contextlib.contextmanager
def serve(*models, **options):
    """`serve_folder` in a process of its own (NiceGUI lives once a process); gives its address."""
    program = (
        "import sys, ast; from hanlin.cli.serve import ServedModel, serve_folder;"
        "models, options = ast.literal_eval(sys.argv[1]);"
        "serve_folder([ServedModel(**model) for model in models], port=0, **options)"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "error::DeprecationWarning:hanlin", "-c", program, repr((models, options))],
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


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium; the page is not driven")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
