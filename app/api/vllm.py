"""The dialect of vLLM's classify and score APIs."""

import time
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, StrictStr

from app.api.answers import json_answer
from app.api.fields import Inputs, as_list
from app.api.json_route import JsonRoute, ServiceOf
from app.service import Scoring, Service, Stats


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """Every refusal on these routes."""

    error: Problem


def refusal(status: int, word: str, message: str) -> tuple[int, Mapping[str, Any]]:
    """An error as vLLM's clients read it, status and body: what is invalid is a bad request there."""
    status = 400 if status == 422 else status
    kind = HTTPStatus(status).phrase.title().replace(" ", "").removesuffix("Error") + "Error"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the request is invalid"},
    401: {"model": ErrorBody, "description": "the key is missing or wrong"},
    413: {"model": ErrorBody, "description": "the body is too large"},
    424: {"model": ErrorBody, "description": "the model is of another kind"},
    429: {"model": ErrorBody, "description": "overloaded; Retry-After says when to come back"},
    500: {"model": ErrorBody, "description": "the encoder failed"},
    503: {"model": ErrorBody, "description": "not ready; Retry-After says when to come back"},
    504: {"model": ErrorBody, "description": "the deadline passed"},
    "default": {"model": ErrorBody, "description": "any other refusal"},
}

router = APIRouter(tags=["classify"], responses=_ERRORS, route_class=JsonRoute)


class ClassifyRequest(BaseModel):
    input: Inputs


class Classified(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Classification(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class ScoreRequest(BaseModel):
    text_1: StrictStr | list[StrictStr]
    text_2: StrictStr | list[StrictStr]


class Score(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class Scores(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage


async def by_head(request: ClassifyRequest, service: Service) -> Response:
    """The best label of each text by the head of the checkpoint, and the score of every label, in its order."""
    scores, stats = await service.predict(as_list(request.input), Scoring())
    labels = service.config.labels
    data = [
        {"index": place, "label": labels[row.argmax()], "probs": row, "num_classes": len(labels)}
        for place, row in enumerate(scores)
    ]
    return _list("classify", data, service, stats)


@router.post("/score", response_model=Scores)
@router.post("/v1/score", response_model=Scores)
async def score(request: ScoreRequest, service: ServiceOf) -> Response:
    """How well texts go together, one with one, one with many, or pair by pair; with an embedder, their cosine."""
    a, b = ([texts] if isinstance(texts, str) else texts for texts in (request.text_1, request.text_2))
    scores, stats = await service.score(a, b, Scoring())
    data = [{"index": place, "object": "score", "score": score} for place, score in enumerate(scores)]
    return _list("score", data, service, stats)


def _list(what: str, data: list[dict[str, Any]], service: Service, stats: Stats) -> Response:
    answer = {
        "id": f"{what}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": data,
        "usage": {"prompt_tokens": stats.tokens, "total_tokens": stats.tokens},
    }
    return json_answer(service, answer, stats)
