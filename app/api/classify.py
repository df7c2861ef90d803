"""Classification in vLLM's shape, and the classifiers that are fitted over HTTP."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Discriminator, Field, StrictStr, Tag
from typing_extensions import TypedDict

from app.api.answers import error_body, in_places, json_answer, vllm_list
from app.api.fields import PROMPT_NAME, Inputs, Many, Overflow, PerText, PerTextQuery, Raw, as_list, examples
from app.api.json_route import JsonRoute, ServiceOf
from app.api.responses import ANSWERED, ANYWHERE, CUT, ENCODED, READ, ErrorBody, Responses, TextDetail, Usage, errors
from app.classification import Classification, Classified, Example
from app.classifiers import Card
from app.embedding import Embedding
from app.errors import EmptyInput, InvalidInput
from app.inputs import Input
from app.render import json_bytes
from app.scoring import Scoring, predict
from app.service import Service
from model.config import PoolingMode


def classification_of(request: Request) -> Classification:
    """The classifiers of the service that answers this request."""
    classification: Classification = request.state.current.classification
    return classification


ClassificationOf = Annotated[Classification, Depends(classification_of)]


router = APIRouter(tags=["classify"], responses=errors(ErrorBody, ANYWHERE, READ), route_class=JsonRoute)
classifiers = APIRouter(tags=["classify"], responses=errors(ErrorBody, ANYWHERE, [422]))  # the routes without a body


_FITTED: Responses = CUT | errors(
    ErrorBody, [409, 424, 500, 507], changed={500: "the encoder or the fit failed, or the server has a defect"}
)

_WAYS = "wanted either classifier, the name of one that PUT /classifiers/{name} fitted, or labels, the names to choose from"


class Space(Overflow):
    """Which vectors a text is told by; null is the same as absent."""

    pooling: PoolingMode | None = Field(None, description="default: the checkpoint's own")
    prompt_name: StrictStr | None = Field(None, description=PROMPT_NAME)


class ExampleBody(TypedDict):
    text: StrictStr
    label: StrictStr


class FitRequest(Space):
    model_config = examples({"examples": [{"text": "so happy", "label": "good"}, {"text": "how sad", "label": "bad"}]})

    examples: Many[ExampleBody] = Field(description="2 to 100,000, of 2 to 1,000 labels")
    class_weight: Literal["balanced"] | None = Field(None, description="balanced: rare labels weigh as much as frequent ones")


class ChoiceRequest(Space):
    model_config = examples({"input": "Where is my parcel?", "labels": ["billing", "delivery"]})

    input: Inputs
    classifier: StrictStr | None = Field(None, description="the name of a classifier that was fitted on examples")
    labels: Many[StrictStr] | None = Field(None, description="names of labels to choose from without examples")
    template: StrictStr | None = Field(None, description="what stands around a label's name, as {}; default: nothing")


class HeadRequest(Overflow, Raw):
    model_config = examples({"input": ["a good film"]})

    input: Inputs


ClassifyRequest = Annotated[
    Annotated[ChoiceRequest, Tag("of a choice")] | Annotated[HeadRequest, Tag("of a head")],
    Discriminator(lambda body: "of a choice" if isinstance(body, dict) and _names_a_choice(body) else "of a head"),
]


def _names_a_choice(body: Mapping[str, Any]) -> bool:
    return any(body.get(name) is not None for name in ("classifier", "labels", "template"))


class Class(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Unclassified(ErrorBody):
    """A text that failed, with `partial`."""

    index: int


class ClassifyBody(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str] = Field(description="the order of probs")
    data: list[Class | Unclassified]
    usage: Usage
    details: list[TextDetail] | None = None


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


@router.post("/classify", response_model=ClassifyBody, responses=ANSWERED | errors(ErrorBody, ENCODED, [404, 409]))
async def classify(
    request: ClassifyRequest, service: ServiceOf, classification: ClassificationOf, query: PerTextQuery
) -> Response:
    """The probability of each label: by a fitted classifier, by the labels' names, or by the head of the checkpoint."""
    inputs = as_list(request.input)
    if isinstance(request, HeadRequest):
        found = await _by_head(inputs, request, service, query)
    else:
        found = await _by_choice(inputs, request, classification, query)
    errors = found.stats.errors
    classes = in_places(_classes(found), errors, lambda place, error: {"index": place, **error_body(error)})
    body = vllm_list("classify", classes, service, found.stats, query)
    return json_answer(service, {**body, "labels": found.labels}, found.stats)


async def _by_head(inputs: Sequence[Input], request: HeadRequest, service: Service, query: PerText) -> Classified:
    if service.config.kind == "embedder":
        raise InvalidInput(_WAYS)
    how = Scoring(request.habit, partial=query.partial, raw=request.raw)
    return Classified(service.config.labels, *await predict(service, inputs, how))


async def _by_choice(
    inputs: Sequence[Input], request: ChoiceRequest, classification: Classification, query: PerText
) -> Classified:
    """By whichever of the ways the request names."""
    options = Embedding(request.habit, prompt_name=request.prompt_name, partial=query.partial, pooling=request.pooling)
    if request.classifier is not None and request.labels is None and request.template is None:
        return await classification.classify(request.classifier, inputs, options)
    if request.classifier is None and request.labels is not None:
        template = "{}" if request.template is None else request.template
        return await classification.classify_by_names(inputs, request.labels, template, options)
    raise InvalidInput(_WAYS)


@router.put("/classifiers/{name}", response_model=FittedBody, responses=_FITTED)
async def fit(request: FitRequest, classification: ClassificationOf, name: str) -> Response:
    """Fit a classifier on examples and keep it under a name, in the place of the one that has it. No deadline applies."""
    if not request.examples:
        raise EmptyInput("examples is empty; wanted 2 or more")
    examples = [Example(**example) for example in request.examples]
    options = Embedding(request.habit, prompt_name=request.prompt_name, pooling=request.pooling)
    outcome = await classification.fit(name, examples, options, balanced=request.class_weight == "balanced")
    body = {**_described(name, outcome.card, None), "seconds": round(outcome.seconds, 3)}
    return _json(body, {"x-truncated": str(outcome.card.truncated)})


@classifiers.get("/classifiers", response_model=ClassifiersBody)
async def list_classifiers(classification: ClassificationOf) -> Response:
    """Every classifier, also those that can't be used here, with the reason."""
    return _json({"classifiers": [_described(*known) for known in classification.known()]})


@classifiers.get("/classifiers/{name}", response_model=ClassifierBody | BrokenBody, responses=errors(ErrorBody, [404]))
async def get_classifier(name: str, classification: ClassificationOf) -> Response:
    """What is known of a classifier."""
    return _json(_described(name, *classification.problem(name)))


@classifiers.delete("/classifiers/{name}", response_model=DeletedBody, responses=errors(ErrorBody, [404, 507]))
async def delete_classifier(name: str, classification: ClassificationOf) -> Response:
    """Forget a classifier."""
    await classification.delete(name)
    return _json({"name": name, "deleted": True})


def _described(name: str, card: Card | None, problem: str | None) -> dict[str, Any]:
    known = card.model_dump() if card else {}
    return {"name": name, "usable": problem is None, "problem": problem, **known}


def _classes(found: Classified) -> Iterator[dict[str, Any]]:
    """The most probable label of each row, and the row."""
    rows = found.probabilities
    for index, (row, best) in enumerate(zip(rows, rows.argmax(axis=1), strict=True)):
        yield {"index": index, "label": found.labels[best], "probs": row, "num_classes": len(found.labels)}


def _json(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(value), media_type="application/json", headers=headers)
