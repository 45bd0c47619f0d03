"""What a client reads when something is wrong: OpenAI's error object with an HTTP status.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}

400 what the client can correct (also what frameworks call 422), 401 key, 403 not allowed, 404 model or address, 405
method, 408 took too long, 413 body too large, 429 queue full or too much asked for, 500 a bug of ours, 503 going down.
The `openai` package turns each into its own exception class. Below /v1/messages the same leaves in Anthropic's form,
{"type": "error", "error": {"type", "message"}}.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hanlin.core.errors import HanlinError
from hanlin.engine import Busy

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
}
ANTHROPIC = {413: "request_too_large", 500: "api_error", 503: "overloaded_error", 408: "timeout_error"}


class ApiError(HanlinError):
    """An answer that is an error: raise it anywhere below a route. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_body(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """The same error in Anthropic's form."""
    error = body["error"]
    return {"type": "error", "error": {"type": ANTHROPIC.get(status, error["type"]), "message": error["message"]}}


def describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for anything that a route, or the engine in the middle of a stream, may raise."""
    if isinstance(error, ApiError):
        return error.status, error_body(str(error), status=error.status, param=error.param, code=error.code)
    if isinstance(error, Busy):
        return 429, error_body(str(error), status=429, code="engine_busy")
    if isinstance(error, HanlinError):
        return 400, error_body(str(error), status=400, code="invalid_value")
    return 500, error_body("The server failed at this request; its log has the traceback.", status=500)


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app leaves as the error object of the interface that was asked."""

    def answer_with(
        request: Request, status: int, body: dict[str, Any], headers: dict[str, str] | None
    ) -> JSONResponse:
        if request.url.path.startswith("/v1/messages"):
            body = anthropic_body(status, body)
        return JSONResponse(body, status, headers)

    async def answer(request: Request, error: Exception) -> JSONResponse:
        status, body = describe_error(error)
        wait = error.retry_after if isinstance(error, ApiError) else None
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if status == 429 or wait is not None:
            headers["Retry-After"] = str(wait or 1)
        return answer_with(request, status, body, headers)

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}."
        headers = dict(error.headers) if error.headers else None
        return answer_with(request, error.status_code, error_body(message, status=error.status_code), headers)

    app.add_exception_handler(HanlinError, answer)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(Exception, answer)
