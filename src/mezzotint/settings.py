"""The base class of everything that a recipe configures: frozen, typed, documented, and strict about unknown keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from mezzotint.errors import MezzotintError, closest, shortened
from mezzotint.written import read_field


class Settings(BaseModel):
    """A frozen record whose fields are validated when it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_the_field_has_it(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            return read_field(cls.model_fields[str(info.field_name)].annotation, value)
        except ValueError as error:
            raise PydanticCustomError("yaml", "{reason}", {"reason": str(error)}) from None

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
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
