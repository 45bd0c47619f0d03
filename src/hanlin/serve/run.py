"""Start the server: one address, one uvicorn, and a clear word if the port is taken."""

import contextlib
import errno
import socket
import time
from types import FrameType

from fastapi import FastAPI

from hanlin.core.errors import HanlinError, require
from hanlin.serve.limits import Gate


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. A taken port is a `HanlinError` that names one that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # from here on connections wait instead of failing, while models load
    except OSError as error:
        listener.close()
        raise HanlinError(_why_not(host, port, error)) from error
    except OverflowError as error:
        listener.close()
        raise HanlinError(f"The port is {port}; it must be between 0 and 65535.") from error
    return listener


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        with bind(host, 0) as other:
            free = other.getsockname()[1]
        return f"Port {port} on {host} is already in use by another program. Use a free one: --port {free}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Port {port} needs the rights of an administrator. Use one above 1023, such as --port 8000"
    return f"The server cannot listen on {host}: {error.strerror or error}. Use --host 127.0.0.1 for this machine only."


def address_of(listener: socket.socket) -> str:
    """What to type into a browser on this machine."""
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def run_app(app: FastAPI, listener: socket.socket, *, access_log: bool = False, drain_seconds: float = 30.0) -> None:
    """Serve until Ctrl-C or SIGTERM. Then new requests are answered 503, those under way may end, and the server is
    gone when the last has ended or drain_seconds are over. A second signal ends it at once."""
    uvicorn = require("uvicorn", "serve")
    gate: Gate = app.state.gate

    class DrainingServer(uvicorn.Server):
        deadline: float | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.deadline is None and drain_seconds > 0 and gate.open:
                gate.closed = True
                self.deadline = time.monotonic() + drain_seconds
            else:
                self.should_exit = True  # and nothing is raised again: the engines are to be closed in order

        async def on_tick(self, counter: int) -> bool:
            if self.deadline is not None and (not gate.open or time.monotonic() > self.deadline):
                self.should_exit = True
            return await super().on_tick(counter)

    config = uvicorn.Config(
        app, log_level="info" if access_log else "warning", access_log=access_log, timeout_graceful_shutdown=2
    )
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a server is meant to end
        DrainingServer(config).run(sockets=[listener])
