"""The dialect of vLLM's score API."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import AliasChoices, BaseModel, Field, StrictStr

from app import scoring
from app.api.answers import in_places, json_answer, vllm_list
from app.api.fields import PROMPT_NAME, Many, Overflow, PerTextQuery, Raw, examples
from app.api.json_route import JsonRoute, ServiceOf
from app.api.responses import ANSWERED, ANYWHERE, ENCODED, TextDetail, Usage, errors
from app.errors import ServiceError
from app.scoring import Scoring


class ScoreProblem(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ScoreError(BaseModel):
    """Every refusal on these routes."""

    error: ScoreProblem


def refusal(status: int, word: str, message: str) -> tuple[int, Mapping[str, Any]]:
    """An error as vLLM's clients read it, status and body: what is invalid is a bad request there."""
    status = 400 if status == 422 else status
    kind = HTTPStatus(status).phrase.title().replace(" ", "").removesuffix("Error") + "Error"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


router = APIRouter(
    tags=["score"],
    responses=ANSWERED | errors(ScoreError, ANYWHERE, ENCODED, [400, "default"], changed={400: "the request is invalid"}),
    route_class=JsonRoute,
)


class ScoreRequest(Overflow, Raw):
    model_config = examples({"text_1": "a fruit", "text_2": ["apple", "car"]})

    text_1: StrictStr | Many[StrictStr] = Field(
        validation_alias=AliasChoices("text_1", "queries", "data_1"), description="also as queries or data_1"
    )
    text_2: StrictStr | Many[StrictStr] = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2"), description="also as documents, items or data_2"
    )
    prompt_name: StrictStr | None = Field(None, description=f"{PROMPT_NAME}; a reranker puts it before text_1 only")


class Score(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class Unscored(ScoreError):
    """A pair that failed, with `partial`."""

    index: int
    object: Literal["error"]


class Scores(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score | Unscored]
    usage: Usage
    details: list[TextDetail] | None = Field(None, description="of each pair; with an embedder of each text, text_1 first")


@router.post("/score", response_model=Scores)
@router.post("/v1/score", response_model=Scores)
async def score(request: ScoreRequest, service: ServiceOf, query: PerTextQuery) -> Response:
    """How well texts go together, one with one, one with many, or pair by pair; with an embedder, their cosine."""
    a, b = ([texts] if isinstance(texts, str) else texts for texts in (request.text_1, request.text_2))
    how = Scoring(on_overflow=request.habit, prompt_name=request.prompt_name, partial=query.partial, raw=request.raw)
    scores, errors, stats = await scoring.score(service, a, b, how)
    data = ({"index": place, "object": "score", "score": score} for place, score in enumerate(scores))
    return json_answer(service, vllm_list("score", in_places(data, errors, _unscored), service, stats, query), stats)


def _unscored(place: int, error: ServiceError) -> dict[str, Any]:
    return {"index": place, "object": "error", **refusal(error.status, error.word, error.message)[1]}
