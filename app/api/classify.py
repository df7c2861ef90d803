"""Classification in vLLM's shape, and the classifiers that are fitted over HTTP."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Discriminator, Field, StrictBool, StrictStr, Tag
from typing_extensions import TypedDict

from app.api.answers import ErrorBody, Usage, errors, json_answer, vllm_list
from app.api.fields import HABITS, Inputs, as_list
from app.api.json_route import JsonRoute, ServiceOf
from app.classification import Classification, Classified, Example
from app.classifiers import Card
from app.errors import EmptyInput, InvalidInput
from app.render import json_bytes
from app.service import Embedding, Scoring, Service
from model.config import PoolingMode
from model.vectors import FloatArray


def classification_of(request: Request) -> Classification:
    """The classifiers that this app was made with."""
    classification: Classification = request.state.current.classification
    return classification


ClassificationOf = Annotated[Classification, Depends(classification_of)]


_ERRORS = errors(
    ErrorBody,
    {
        404: "no classifier has this name",
        409: "the classifier is broken or belongs to other vectors, or the name is taken in another case",
        500: "the encoder or the fit failed",
        507: "the folder of classifiers can't be written",
    },
)

router = APIRouter(tags=["classify"], responses=_ERRORS, route_class=JsonRoute)
classifiers = APIRouter(tags=["classify"], responses=_ERRORS)  # the routes without a body


_WAYS = "wanted either classifier, the name of one that PUT /classifiers/{name} fitted, or labels, the names to choose from"


class Space(BaseModel):
    """Which vectors a text is told by; null is the same as absent."""

    pooling: PoolingMode | None = Field(None, description="default: the checkpoint's own")
    prompt_name: StrictStr | None = Field(None, description="a prompt of the checkpoint to put before each text")


class ExampleBody(TypedDict):
    text: StrictStr
    label: StrictStr


class FitRequest(Space):
    examples: list[ExampleBody] = Field(description="2 to 100,000, of 2 to 1,000 labels")
    class_weight: Literal["balanced"] | None = Field(None, description="balanced: rare labels weigh as much as frequent ones")


class ChoiceRequest(Space):
    input: StrictStr | list[StrictStr]
    classifier: StrictStr | None = Field(None, description="the name of a classifier that was fitted on examples")
    labels: list[StrictStr] | None = Field(None, description="names of labels to choose from without examples")
    template: StrictStr | None = Field(None, description="what stands around a label's name, as {}; default: nothing")
    truncate: StrictBool | None = Field(None, description="false refuses a text that is too long; default: cut it")


class HeadRequest(BaseModel):
    input: Inputs


ClassifyRequest = Annotated[
    Annotated[ChoiceRequest, Tag("of a choice")] | Annotated[HeadRequest, Tag("of a head")],
    Discriminator(lambda body: "of a choice" if isinstance(body, dict) and _CHOICE.intersection(body) else "of a head"),
]
_CHOICE = {"classifier", "labels", "template"}


class Class(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyBody(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str] | None = Field(None, description="the order of probs; a checkpoint's own labels are in /info")
    data: list[Class]
    usage: Usage


class ClassifierBody(Card):
    name: str
    usable: bool
    problem: str | None


class BrokenBody(BaseModel):
    """A classifier whose file can't be read."""

    name: str
    usable: Literal[False]
    problem: str


class FittedBody(ClassifierBody):
    seconds: float


class ClassifiersBody(BaseModel):
    classifiers: list[ClassifierBody | BrokenBody]


class DeletedBody(BaseModel):
    name: str
    deleted: Literal[True]


@router.post("/classify", response_model=ClassifyBody)
async def classify(request: ClassifyRequest, service: ServiceOf, classification: ClassificationOf) -> Response:
    """The probability of each label: by a fitted classifier, by the labels' names, or by the head of the checkpoint."""
    if isinstance(request, HeadRequest):
        return await _by_head(request, service)
    texts = [request.input] if isinstance(request.input, str) else request.input
    answer = await _classified(request, texts, classification)
    body = vllm_list("classify", _classes(answer.labels, answer.probabilities), service, answer.stats)
    return json_answer(service, {**body, "labels": answer.labels}, answer.stats)


async def _by_head(request: HeadRequest, service: Service) -> Response:
    if service.config.kind == "embedder":
        raise InvalidInput(_WAYS)
    scores, stats = await service.predict(as_list(request.input), Scoring())
    return json_answer(service, vllm_list("classify", _classes(service.config.labels, scores), service, stats), stats)


async def _classified(request: ChoiceRequest, texts: Sequence[str], classification: Classification) -> Classified:
    """By whichever of the ways the request names."""
    options = Embedding(on_overflow=HABITS.get(request.truncate), pooling=request.pooling, prompt_name=request.prompt_name)
    if request.classifier is not None and request.labels is None and request.template is None:
        return await classification.classify(request.classifier, texts, options)
    if request.classifier is None and request.labels is not None:
        template = "{}" if request.template is None else request.template
        return await classification.classify_by_names(texts, request.labels, template, options)
    raise InvalidInput(_WAYS)


@router.put("/classifiers/{name}", response_model=FittedBody)
async def fit(request: FitRequest, classification: ClassificationOf, name: str) -> Response:
    """Fit a classifier on examples and keep it under a name, in the place of the one that has it. No deadline applies."""
    if not request.examples:
        raise EmptyInput("examples is empty; wanted 2 or more")
    examples = [Example(**example) for example in request.examples]
    options = Embedding(pooling=request.pooling, prompt_name=request.prompt_name)
    outcome = await classification.fit(name, examples, options, balanced=request.class_weight == "balanced")
    body = {**_described(name, outcome.card, None), "seconds": round(outcome.seconds, 3)}
    return _json(body, {"x-truncated": str(outcome.card.truncated)})


@classifiers.get("/classifiers", response_model=ClassifiersBody)
async def list_classifiers(classification: ClassificationOf) -> Response:
    """Every classifier, also those that can't be used here, with the reason."""
    return _json({"classifiers": [_described(*known) for known in classification.known()]})


@classifiers.get("/classifiers/{name}", response_model=ClassifierBody | BrokenBody)
async def get_classifier(name: str, classification: ClassificationOf) -> Response:
    """What is known of a classifier."""
    return _json(_described(name, *classification.problem(name)))


@classifiers.delete("/classifiers/{name}", response_model=DeletedBody)
async def delete_classifier(name: str, classification: ClassificationOf) -> Response:
    """Forget a classifier."""
    await classification.delete(name)
    return _json({"name": name, "deleted": True})


def _described(name: str, card: Card | None, problem: str | None) -> dict[str, Any]:
    known = card.model_dump() if card else {}
    return {"name": name, "usable": problem is None, "problem": problem, **known}


def _classes(labels: Sequence[str], rows: FloatArray) -> list[dict[str, Any]]:
    """The most probable label of each row [N, labels], and the row."""
    return [
        {"index": index, "label": labels[best], "probs": row, "num_classes": len(labels)}
        for index, (row, best) in enumerate(zip(rows, rows.argmax(axis=1), strict=True))
    ]


def _json(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(value), media_type="application/json", headers=headers)
