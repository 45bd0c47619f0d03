"""Server-sent events over a `Generation`, and how a route with a hand-read body stands in the OpenAPI schema."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from hanlin.serve.answers import DONE, server_sent_event
from hanlin.serve.errors import describe_error
from hanlin.serve.generation import Generation

log = logging.getLogger("hanlin.serve")


class StreamedAnswer(StreamingResponse):
    """Sends chunks, then the end; a failure on the way is a data line with the error. However it ends, by the client's
    leaving too, the generation's places in the engine are free afterwards.

    failed: an error object as this interface streams it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        generation: Generation,
        *,
        end: bytes = DONE,
        failed: Callable[[dict[str, Any]], bytes] = server_sent_event,
    ) -> None:
        super().__init__(
            _guarded(chunks, end, failed), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()


async def _guarded(
    chunks: AsyncIterator[bytes], end: bytes, failed: Callable[[dict[str, Any]], bytes]
) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:  # the status line has left: the only place for the error is the stream itself
        status, body = describe_error(error)
        if status >= 500:
            log.exception("A stream failed.")
        yield failed(body)
        return
    if end:
        yield end


def describe_body(kind: type[BaseModel]) -> dict[str, Any]:
    """The request body for OpenAPI, as a route reads it by hand (`read_request`)."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inline(schema, definitions)}}}
    }


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its references replaced by what they name, as hand-made bodies have no components section."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    return {key: _inline(value, definitions) for key, value in schema.items()}
