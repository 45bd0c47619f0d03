"""`hanlin runs watch`: a server of this machine's own with the health page of the runs of a folder."""

from pathlib import Path

from fastapi import FastAPI, Request
from nicegui import ui

from hanlin.core.progress import say
from hanlin.serve.app import NO_TELEMETRY
from hanlin.serve.limits import Gate
from hanlin.serve.run import address_of, bind, run_app
from hanlin.studio.frame import SEAL, TITLE, begin_page, mount_pages
from hanlin.studio.health_page import HealthPage

STYLE = Path(__file__).with_name("health.css")


def watch_runs(root: Path, *, port: int = 8001, quiet: bool = False) -> None:
    """Serve the page until Ctrl-C, to this machine only. Port 0 takes any free one."""
    listener = bind("127.0.0.1", port)
    try:
        app = FastAPI(title="Hanlin", docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY)
        app.state.gate = Gate()

        async def health_page(request: Request) -> None:
            language, dark = begin_page(request)
            ui.add_css(STYLE)
            HealthPage(root, language).build(dark=dark)

        ui.page("/", title=TITLE, favicon=SEAL, dark=None)(health_page)
        mount_pages(app)
        say(f"The runs of {root} are at {address_of(listener)}", quiet=quiet)
        say("  Ctrl-C stops it.", quiet=quiet)
        run_app(app, listener, drain_seconds=0)
    finally:
        listener.close()
