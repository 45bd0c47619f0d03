"""Start the server: one address, one uvicorn, and a clear word if the port is taken."""

import contextlib
import errno
import socket

from fastapi import FastAPI

from hanlin.core.errors import HanlinError, require


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


def run_app(app: FastAPI, listener: socket.socket, *, access_log: bool = False) -> None:
    """Serve until Ctrl-C or SIGTERM; requests under way get five seconds to end."""
    uvicorn = require("uvicorn", "serve")
    config = uvicorn.Config(
        app, log_level="info" if access_log else "warning", access_log=access_log, timeout_graceful_shutdown=5
    )
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a server is meant to end
        uvicorn.Server(config).run(sockets=[listener])
