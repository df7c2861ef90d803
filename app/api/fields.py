"""Fields that requests of several dialects have."""

from typing import Annotated

from pydantic import Field, StrictInt, StrictStr

from app.service import Input

Ids = list[StrictInt]
Inputs = Annotated[StrictStr | Ids | list[StrictStr | Ids], Field(union_mode="left_to_right")]


def as_list(inputs: Inputs) -> list[Input]:
    """A single text, or the token ids of one, is a list of one from here on."""
    lone = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
    return [inputs] if lone else inputs  # type: ignore[list-item, return-value]
