"""The key: whoever asks for inference shows `Authorization: Bearer KEY`."""

import hmac

from fastapi import Request

from hanlin.serve.errors import ApiError


def same_key(shown: str, key: str) -> bool:
    """Compared in constant time, so that a wrong key tells nothing about the right one."""
    return hmac.compare_digest(shown.encode(), key.encode())


def require_key(request: Request) -> None:
    """A dependency of every guarded route: 401 without the key, if the server has one."""
    key: str | None = request.app.state.api_key
    if key is None:
        return
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    if not shown:
        raise ApiError(401, "This server needs a key: send 'Authorization: Bearer KEY'.", code="missing_api_key")
    shown = shown.strip().encode("latin-1").decode("utf-8", "replace")  # a header is bytes; keys are text
    if scheme.lower() != "bearer" or not same_key(shown, key):
        raise ApiError(401, "The key is wrong.", code="invalid_api_key")
