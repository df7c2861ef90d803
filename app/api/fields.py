"""What clients send to the routes that encode texts, in every dialect that has no words of its own for it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from app.inputs import Input
from app.settings import OnOverflow
from model.config import PoolingMode
from model.vectors import OutputDtype

T = TypeVar("T")

Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first bad item is named and no other: to find a million would hold up everybody else for seconds."""

Ids = Many[StrictInt]
Inputs = Annotated[StrictStr | Ids | Many[StrictStr | Ids], Field(union_mode="left_to_right")]
Side = Annotated[Literal["left", "right"], BeforeValidator(lambda side: side.lower() if isinstance(side, str) else side)]


PROMPT_NAME = "a prompt of the checkpoint to put before each text; an empty name puts none"

HABITS: Mapping[bool | None, OnOverflow] = {True: "truncate", False: "error"}
"""What TEI's `truncate` says; null leaves it to the server."""


def examples(*bodies: dict[str, Any]) -> ConfigDict:
    """Bodies that FastAPI's page shows for a request; each is answered by a model of the right kind."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class PerText(BaseModel):
    """The query of routes that answer per text."""

    details: bool = Field(False, description="answer with an object that holds the result, and what was done to each text")
    partial: bool = Field(False, description="a bad text becomes an error in its place, and its neighbours get their answers")


PerTextQuery = Annotated[PerText, Query()]


class Overflow(BaseModel):
    """What becomes of a text that is too long; null is the same as absent."""

    truncate: StrictBool | None = Field(None, description="true is on_overflow truncate, false is error; on_overflow wins")
    on_overflow: OnOverflow | None = Field(
        None, description="a text that is too long is cut, refused or split into windows; default: the server's"
    )

    @property
    def habit(self) -> OnOverflow | None:
        return self.on_overflow or HABITS.get(self.truncate)


class Raw(BaseModel):
    """Whether scores are what the classifier gives; null is the same as absent."""

    raw_scores: StrictBool | None = Field(None, description="true: what the classifier gives, without sigmoid or softmax")
    use_activation: StrictBool | None = Field(None, description="vLLM's word: false is raw_scores true")

    @property
    def raw(self) -> bool:
        return bool(self.raw_scores) or self.use_activation is False


class Common(Overflow):
    """Options of every route that encodes texts; null is the same as absent."""

    truncation_direction: Side | None = Field(None, description="the side on which a long text is cut")
    prompt_name: StrictStr | None = Field(None, description=PROMPT_NAME)

    def encoding(self, query: PerText) -> dict[str, Any]:
        """The fields of an `Encoding`."""
        return {
            "on_overflow": self.habit,
            "side": self.truncation_direction or "right",
            "prompt_name": self.prompt_name,
            "partial": query.partial,
        }


class Pooled(Common):
    """Options of routes that make one vector of a text."""

    pooling: PoolingMode | None = Field(None, description="default: the checkpoint's own")


class Finished(Pooled):
    """Options of routes that answer with vectors."""

    normalize: StrictBool | None = Field(None, description="scale each vector to length 1; default true")
    dimensions: StrictInt | None = Field(None, description="keep this many numbers of each vector, then normalise")

    def embedding(self, query: PerText) -> dict[str, Any]:
        """The fields of an `Embedding`."""
        normalize = self.normalize is not False
        return {**self.encoding(query), "pooling": self.pooling, "normalize": normalize, "dimensions": self.dimensions}


class Output(BaseModel):
    """How numbers are written."""

    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: the little-endian bytes of the numbers")
    output_dtype: OutputDtype | None = Field(
        None, description="default float32; int8 and uint8 want normalised vectors, binary and ubinary pack signs"
    )

    @property
    def dtype(self) -> OutputDtype:
        return self.output_dtype or "float32"


def as_list(inputs: str | list[Any]) -> list[Input]:
    """A single text, or the token ids of one, is a list of one from here on."""
    lone = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
    return [inputs] if lone else inputs  # type: ignore[return-value]
