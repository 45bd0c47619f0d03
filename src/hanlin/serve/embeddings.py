"""POST /v1/embeddings: texts as vectors, the mean of the model's last hidden states, of length 1.

`dimensions` keeps the first numbers of each vector and makes its length 1 again. Base64 is little-endian float32, which
OpenAI's own client asks for. A vector and a score here are as good as the model's hidden states are for that; a model
that was trained to embed is the right one to serve for it.
"""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, Literal

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, field_validator
from torch import Tensor

from hanlin.serve.access import account_of
from hanlin.serve.answers import usage
from hanlin.serve.completion_request import MAX_PROMPTS, as_many, is_ids
from hanlin.serve.errors import ApiError
from hanlin.serve.models import Served, find_model
from hanlin.serve.requests import Strict, read_request
from hanlin.serve.sampled import check_ids
from hanlin.serve.streaming import describe_body

router = APIRouter()


class EmbeddingRequest(Strict):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)

    @field_validator("input", mode="plain")
    @classmethod
    def _read_input(cls, found: Any) -> Any:
        many = as_many(found) if isinstance(found, str | list) else []
        fits = 0 < len(many) <= MAX_PROMPTS
        if not fits or not (all(isinstance(item, str) and item for item in many) or all(map(is_ids, many))):
            raise ValueError(
                "must be a string, a list of strings, a list of token ids or a list of such lists, "
                f"none empty and at most {MAX_PROMPTS}"
            )
        return found


@router.post("/v1/embeddings", openapi_extra=describe_body(EmbeddingRequest))
async def embed_texts(request: Request) -> JSONResponse:
    body = await read_request(request, EmbeddingRequest)
    served = find_model(request, body.model)
    vectors, tokens = await embed(request, served, as_many(body.input))
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            message = f"'dimensions' is {body.dimensions}; this model's vectors have {vectors.shape[1]} numbers."
            raise ApiError(400, message, param="dimensions", code="invalid_value")
        vectors = torch.nn.functional.normalize(vectors[:, : body.dimensions], dim=-1)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    counts = {name: value for name, value in usage(tokens, 0).items() if name != "completion_tokens"}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": counts})


async def embed(request: Request, served: Served, texts: Sequence[str | list[int]]) -> tuple[Tensor, int]:
    """One vector a text (texts, width), fp32, and how many tokens were read."""
    engine = served.engine
    if served.adapter is not None:
        message = f"'{served.name}' is an adapter; vectors are the bare model's: name '{served.base}'."
        raise ApiError(400, message, param="model", code="unsupported_parameter")
    prompts = await asyncio.to_thread(
        lambda: [engine.tokenizer.prompt(text) if isinstance(text, str) else text for text in texts]
    )
    for ids in prompts:
        check_ids("input", ids, engine.tokenizer.size)
        if not ids:
            raise ApiError(400, "'input' has a text without tokens.", param="input", code="invalid_value")
        if len(ids) > engine.max_context:
            message = f"'input' has a text of {len(ids)} tokens; this model's context holds {engine.max_context}."
            raise ApiError(400, message, param="input", code="context_length_exceeded")
    tokens = sum(map(len, prompts))
    account_of(request).charge(tokens)
    return (await asyncio.to_thread(engine.embed, prompts)).float().cpu(), tokens


def _written(vector: Tensor, encoding: str) -> str | list[float]:
    return (
        base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
    )
