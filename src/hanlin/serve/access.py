"""The door of the interface: whoever asks shows a key, `Authorization: Bearer KEY` or `x-api-key: KEY`.

A dependency of every guarded route. The request's account (`limits.py`) stands in `request.state.account` afterwards.
"""

from collections.abc import AsyncGenerator

from fastapi import Request

from hanlin.serve.limits import Account, Gate, same_key

__all__ = ["account_of", "require_key", "same_key", "take_place"]


def require_key(request: Request) -> None:
    """401 without the key, if the server has one."""
    gate: Gate = request.app.state.gate
    request.state.account = gate.account(_shown(request))


async def take_place(request: Request) -> AsyncGenerator[None]:
    """A place among the requests under way until the answer has left, its last byte too."""
    gate: Gate = request.app.state.gate
    account = account_of(request)
    gate.enter(account)
    try:
        yield
    finally:
        gate.leave(account)


def account_of(request: Request) -> Account:
    """Whose request it is."""
    return request.state.account


def _shown(request: Request) -> str | None:
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not shown.strip():
        shown = request.headers.get("x-api-key", "") or (shown and f"{scheme} {shown}")  # Anthropic's way
    return shown.strip().encode("latin-1").decode("utf-8", "replace")  # a header is bytes; keys are text
