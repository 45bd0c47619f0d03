"""How a body is read: size, JSON, then a pydantic model; every complaint is a 400 that names the parameter.

Types are strict ("0.5" is not a number), an unknown key is an error that names its neighbour, and what is known but
does not act is refused by name (`refusals.py`).
"""

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect

from hanlin.serve.errors import ApiError
from hanlin.serve.refusals import Refusals, drop_neutral

MAX_BODY_BYTES = 16 * 2**20

Body = TypeVar("Body", bound="Strict")


class Strict(BaseModel):
    """A body, or a part of one: no conversions, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True)


async def read_request(request: Request, kind: type[Body], *, refusals: Refusals | None = None) -> Body:
    """The body of a request as a checked value, or `ApiError` 400 / 413.

    refusals: what else this route refuses by name.
    """
    body = drop_neutral(_parse_object(await read_body(request)), known=kind.model_fields, more=refusals)
    return checked(kind, body)


async def read_body(request: Request) -> bytes:
    """The whole body, or `ApiError` 400 / 413."""
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > MAX_BODY_BYTES:
                raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB.", code="body_too_large")
    except ClientDisconnect as error:
        raise ApiError(400, "The client left before its request was read.") from error
    return bytes(raw)


def checked(kind: type[Body], body: dict[str, Any]) -> Body:
    """A value of this kind, or `ApiError` 400 that names what is wrong in it."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from error
    except RecursionError as error:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from error


def _parse_object(raw: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(raw, parse_constant=refuse)
        if b"\\u" in raw:  # an escaped half of a character pair is legal JSON but no text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"The body must be a JSON object, not {type(body).__name__}.", code="invalid_json")
    return body


def _explain(error: ValidationError) -> ApiError:
    """The first complaint of pydantic as a sentence with the parameter's path, as in messages[0].role."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"'{path}' is not valid: {message}.", param=path, code="invalid_value")
