"""The base class of everything that a recipe configures: frozen, typed, documented, and strict about unknown keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from mezzotint.errors import MezzotintError, closest, shortened
from mezzotint.randomness import check_seed
from mezzotint.written import read_field

#: the largest number of float32, in which nearly everything is computed
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def _seed(value: Any) -> Any:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # a float: of too many bits
    return check_seed(int(value)) if whole else value


#: of an average of gradients or weights: 1 would never move
Decay = Annotated[float, Field(ge=0, lt=1)]
#: beyond, the very first step of Adam, lr / (1 - beta_1), may overflow float32; far below, the loss tells
LearningRate = Annotated[float, Field(gt=0, le=1e30)]
#: as everywhere, 64 bits without a sign
Seed = Annotated[int, BeforeValidator(_seed)]


class Settings(BaseModel):
    """A frozen record whose fields are validated when it is made. Every number in it is finite, and fits float32."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    def __init__(self, /, *unnamed: Any, **values: Any) -> None:
        """Raises `MezzotintError` as `parse` does."""
        if unnamed:
            known = ", ".join(type(self).model_fields)
            raise MezzotintError(f"{type(self).__name__} takes its values by name: {known}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise MezzotintError(_sentence(type(self), error.errors()[0])) from None

    # As pydantic's own: a record within a record is validated without it, so that all of a mistake's place is known.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("*")
    @classmethod
    def _fits_float32(cls, value: Any) -> Any:
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and abs(number) > FLOAT32_MAX:
                raise PydanticCustomError("float32", "numbers go up to 3.4e38, the largest of float32")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _as_the_field_has_it(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            return read_field(cls.model_fields[str(info.field_name)].annotation, value)
        except ValueError as error:
            raise PydanticCustomError("yaml", "{reason}", {"reason": str(error)}) from None

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What differs from the defaults: a recipe has a hundred and fifty fields."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.get_default(call_default_factory=True):
                yield name, value

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """The record with these values; a bad one raises `MezzotintError` with one sentence."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            # Only the first of several mistakes: one sentence that can be acted on beats a list.
            raise MezzotintError(_sentence(cls, error.errors()[0])) from None


def _sentence(root: type[BaseModel], error: ErrorDetails) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path) or root.__name__
    if error["type"] == "extra_forbidden":
        return f"key {shortened(key)} is unknown; {closest(path[-1], _fields_at(root, path[:-1]))}"
    if error["type"] == "missing":
        return f"key {key!r} is missing; it has no default"
    if "error" in (context := error.get("ctx", {})) and isinstance(context["error"], Exception):
        return str(context["error"])  # raised by a validator of ours, already a sentence
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "model_type":
        message = "expected keys with values, in braces or a line each"
    return f"{key} = {shortened(error['input'])} is not valid: {message}"


def _fields_at(root: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the settings class that `path` leads to from `root`."""
    for part in path:
        annotation = root.model_fields[part].annotation if part in root.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        root = annotation
    return list(root.model_fields)
