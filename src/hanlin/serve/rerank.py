"""POST /rerank, /v1/rerank and /score: how near texts are, by the cosine of their embeddings (`embeddings.py`).

rerank answers as Jina and Cohere do: documents with the highest score first. score gives one number a pair: one
text against many, or as many pairs as there are.
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, field_validator

from hanlin.serve.answers import Envelope
from hanlin.serve.completion_request import MAX_PROMPTS
from hanlin.serve.embeddings import embed
from hanlin.serve.errors import ApiError
from hanlin.serve.models import find_model
from hanlin.serve.requests import Strict, read_request
from hanlin.serve.streaming import describe_body

router = APIRouter()


class RerankRequest(Strict):
    """documents: texts, or objects with a "text"."""

    model: str | None = None
    query: str = Field(min_length=1)
    documents: list[str | dict[str, Any]] = Field(min_length=1, max_length=MAX_PROMPTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True

    @field_validator("documents", mode="plain")
    @classmethod
    def _read_documents(cls, found: Any) -> list[str]:
        entries = found if isinstance(found, list) and 0 < len(found) <= MAX_PROMPTS else [None]
        said = [entry.get("text") if isinstance(entry, dict) and len(entry) == 1 else entry for entry in entries]
        texts = [text for text in said if isinstance(text, str) and text]
        if len(texts) < len(said):
            raise ValueError(f"must be 1 to {MAX_PROMPTS} non-empty strings, or objects with nothing but a 'text'")
        return texts


class ScoreRequest(Strict):
    model: str | None = None
    text_1: str | list[str]
    text_2: str | list[str]

    @field_validator("text_1", "text_2", mode="plain")
    @classmethod
    def _read_texts(cls, found: Any) -> list[str]:
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not 0 < len(texts) <= MAX_PROMPTS:
            raise ValueError(f"must be a string or a list of 1 to {MAX_PROMPTS} of them")
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError("must be non-empty strings")
        return texts


@router.post("/rerank", openapi_extra=describe_body(RerankRequest))
@router.post("/v1/rerank", openapi_extra=describe_body(RerankRequest))
async def rerank(request: Request) -> JSONResponse:
    body = await read_request(request, RerankRequest)
    served = find_model(request, body.model)
    documents = [str(text) for text in body.documents]
    vectors, tokens = await embed(request, served, [body.query, *documents])
    scores = (vectors[1:] @ vectors[0]).tolist()
    best = sorted(range(len(documents)), key=lambda index: -scores[index])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    envelope = Envelope("rerank", served.name, "rerank")
    counts = {"total_tokens": tokens}
    return JSONResponse({"id": envelope.full_id, "model": served.name, "usage": counts, "results": results})


@router.post("/score", openapi_extra=describe_body(ScoreRequest))
@router.post("/v1/score", openapi_extra=describe_body(ScoreRequest))
async def score(request: Request) -> JSONResponse:
    body = await read_request(request, ScoreRequest)
    served = find_model(request, body.model)
    left, right = list(body.text_1), list(body.text_2)
    if len(left) != len(right) and len(left) != 1:
        message = f"'text_1' has {len(left)} texts and 'text_2' {len(right)}; expected as many, or one in 'text_1'."
        raise ApiError(400, message, param="text_1", code="invalid_value")
    vectors, tokens = await embed(request, served, [*left, *right])
    scores = (vectors[: len(left)] * vectors[len(left) :]).sum(-1).tolist()
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    envelope = Envelope("list", served.name, "score")
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({**envelope.head, "data": data, "usage": counts})
