"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters come and go while the server runs.

A loaded adapter is a model of its own name in /v1/models. Files are only read below the folder that the server was
started with for this purpose (`--adapter-root`), whatever path a client sends; without one the routes refuse.
"""

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from hanlin.serve.access import account_of
from hanlin.serve.errors import ApiError
from hanlin.serve.models import Models, Served, models_of
from hanlin.serve.requests import Strict, read_request
from hanlin.serve.streaming import describe_body

router = APIRouter()

NAME = r"^[^\s/\\\x00-\x1f]{1,128}$"


class LoadAdapterRequest(Strict):
    """lora_path: the folder of the adapter's files, below the server's adapter root. model: on which engine."""

    lora_name: str = Field(pattern=NAME)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    model: str | None = None


class UnloadAdapterRequest(Strict):
    lora_name: str
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", openapi_extra=describe_body(LoadAdapterRequest))
async def load_adapter(request: Request) -> JSONResponse:
    body = await read_request(request, LoadAdapterRequest)
    root = _root(request)
    models = models_of(request)
    served = models.served()
    base = models.find(body.model)
    if base.adapter is not None:
        raise ApiError(400, f"'{body.model}' is itself an adapter.", param="model", code="invalid_value")
    present = served.get(body.lora_name)
    if present is not None and not (body.load_inplace and present.adapter and present.base == base.base):
        message = f"There is a model called '{body.lora_name}' already. Unload it first, or choose another name."
        raise ApiError(400, message, param="lora_name", code="invalid_value")
    folder = (root / body.lora_path).resolve() if "\x00" not in body.lora_path else None
    if folder is None or not folder.is_relative_to(root) or not folder.is_dir():
        message = f"'{body.lora_path}' is not a folder below the server's adapter root."
        raise ApiError(400, message, param="lora_path", code="invalid_value")
    if present is not None:
        await asyncio.to_thread(base.engine.unload_adapter, body.lora_name)
    await asyncio.to_thread(base.engine.load_adapter, body.lora_name, folder)
    return JSONResponse(models.describe(models.find(body.lora_name)))


@router.post("/v1/unload_lora_adapter", openapi_extra=describe_body(UnloadAdapterRequest))
async def unload_adapter(request: Request) -> JSONResponse:
    body = await read_request(request, UnloadAdapterRequest)
    _root(request)
    if body.lora_int_id is not None:
        raise ApiError(400, "Adapters have names here, no numbers.", param="lora_int_id", code="unsupported_parameter")
    served = _find(models_of(request), body.lora_name)
    await asyncio.to_thread(served.engine.unload_adapter, body.lora_name)
    return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})


def _find(models: Models, name: str) -> Served:
    served = models.served().get(name)
    if served is None or served.adapter is None:
        raise ApiError(404, f"There is no adapter called '{name}'.", param="lora_name", code="model_not_found")
    return served


def _root(request: Request) -> Path:
    root: Path | None = request.app.state.adapter_root
    if root is None:
        message = "This server loads no adapters while it runs. Start it with --adapter-root FOLDER for that."
        raise ApiError(403, message, code="not_allowed")
    if account_of(request).key.adapters is not None:
        raise ApiError(403, "This key is bound to its adapters and cannot load or unload any.", code="not_allowed")
    return root.resolve()
