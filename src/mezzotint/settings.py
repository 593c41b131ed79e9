"""The base class of everything that a recipe configures: frozen, typed, documented, and strict about unknown keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from mezzotint.errors import MezzotintError, closest, nearest, shortened
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
        return unknown_key(root, path)
    found = _list_at(root, path)
    of_length = error["type"] in ("too_long", "too_short") or (error["type"] == "missing" and path[-1].isdigit())
    if found and (of_length or error["type"] == "tuple_type"):
        listed, field = found
        example = f", such as {listed}={text}" if (text := _list_example(field, error["input"])) else ""
        return f"{listed} = {shortened(error['input'])} is not valid: expected {_length(field)}{example}"
    if error["type"] == "missing":
        return f"key {key!r} is missing; it has no default"
    if "error" in (context := error.get("ctx", {})) and isinstance(context["error"], Exception):
        return str(context["error"])  # raised by a validator of ours, already a sentence
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "model_type":
        message = "expected keys with values, in braces or a line each"
        if fields := _fields_at(root, path):
            message += f", or one alone, such as {key}.{fields[0]}"
    return f"{key} = {shortened(error['input'])} is not valid: {message}"


def unknown_key(root: type[BaseModel], path: Sequence[str]) -> str:
    """The sentence on a key that `root` has not: it names the sections that have one of its name, or what is close."""
    *sections, word = path
    sentence = f"key {shortened('.'.join(path))} is unknown"
    if elsewhere := keys_called(root, word):
        return f"{sentence}; perhaps {' or '.join(elsewhere)}"
    siblings = _fields_at(root, sections)
    names = dict.fromkeys(key.rpartition(".")[2] for key in dotted_keys(root))
    if not nearest(word, siblings, cutoff=0.6) and (like := nearest(word, names, cutoff=0.6)):
        return f"{sentence}; closest: {', '.join(key for name in like for key in keys_called(root, name))}"
    return f"{sentence}; {closest(word, siblings)}"


def keys_called(root: type[BaseModel], name: str) -> list[str]:
    """The keys of a settings class, with their sections, whose own name is `name`, those least deep first."""
    return sorted((key for key in dotted_keys(root) if key.rpartition(".")[2] == name), key=lambda key: key.count("."))


def dotted_keys(root: type[BaseModel]) -> Iterator[str]:
    """Every key of a settings class as it is typed, those of its sections after each section."""
    for name, field in root.model_fields.items():
        yield name
        if (section := _section(field.annotation)) is not None:
            yield from (f"{name}.{key}" for key in dotted_keys(section))


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _fields_at(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Field names of the settings class that `path` leads to from `root`, by way of lists of records, too."""
    for part in path:
        if part.isdigit():
            continue
        annotation = root.model_fields[part].annotation if part in root.model_fields else None
        found = next((one for one in (annotation, *get_args(annotation)) if _section(one)), None)
        if found is None:
            break
        root = found
    return list(root.model_fields)


# ---- Lists -----------------------------------------------------------------------------------------------------------


def _list_at(root: type[BaseModel], path: Sequence[str]) -> tuple[str, FieldInfo] | None:
    """The key and the field of the list that `path` leads to, or to an item of."""
    for depth, part in enumerate(path, 1):
        if (field := root.model_fields.get(part)) is None:
            return None
        if _items(field.annotation) is not None:
            return (".".join(path[:depth]), field) if len(path) - depth < 2 else None
        if (section := _section(field.annotation)) is None:
            return None
        root = section
    return None


def _items(annotation: Any) -> tuple[Any, ...] | None:
    """The types of a list's items, as ``tuple[...]`` has them; None for what is no list."""
    found = next((one for one in (annotation, *get_args(annotation)) if get_origin(one) is tuple), None)
    return None if found is None else get_args(found)


def _length(field: FieldInfo) -> str:
    items = _items(field.annotation) or ()
    least = next((rule.min_length for rule in field.metadata if hasattr(rule, "min_length")), 0)
    if ... in items:
        return f"a list of at least {least}" if least else "a list"
    return f"a list of {len(items)}"


def _list_example(field: FieldInfo, value: Any) -> str:
    """What was typed as the list that was meant, where that is one; else the default. Without spaces, for a shell."""
    typed = None if isinstance(value, list | tuple) else f"[{str(value).replace(', ', ',')}]"
    with suppress(ValueError):
        if typed and TypeAdapter(field.annotation).validate_python(read_field(field.annotation, typed)):  # type: ignore[arg-type]
            return typed
    return f"[{','.join(map(str, field.default))}]" if isinstance(field.default, tuple) and field.default else ""
