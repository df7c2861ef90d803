"""Fields that requests of several dialects have."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictInt, StrictStr

from app.service import Input
from model.vectors import OutputDtype

Ids = list[StrictInt]
Inputs = Annotated[StrictStr | Ids | list[StrictStr | Ids], Field(union_mode="left_to_right")]


class Output(BaseModel):
    """How numbers are written."""

    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: the little-endian bytes of the numbers")
    output_dtype: OutputDtype | None = Field(
        None, description="default float32; int8 and uint8 want normalised vectors, binary and ubinary pack signs"
    )

    @property
    def dtype(self) -> OutputDtype:
        return self.output_dtype or "float32"


def as_list(inputs: Inputs) -> list[Input]:
    """A single text, or the token ids of one, is a list of one from here on."""
    lone = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
    return [inputs] if lone else inputs  # type: ignore[list-item, return-value]
