"""YAML as a person means it: a value keeps the text that was typed until the field that it is for says what it is.

YAML alone takes ``no`` for false, ``2024`` for a number and ``2024-01-31`` for a date, in paths and names, too.
"""

from __future__ import annotations

import math
from contextlib import suppress
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from mezzotint.errors import shortened

#: values of a file, aliases written out; recipes have some hundred, and a few lines of aliases can mean billions
MAX_VALUES = 10_000
#: brackets within brackets
MAX_DEPTH = 50
#: a number that a recipe means fits into so many bits
MAX_BITS = 64

YAML = "tag:yaml.org,2002:"
PLAIN = {YAML + name for name in ("null", "bool", "int", "float", "timestamp", "str", "merge", "value")}
NULL = ("", "~", "null", "Null", "NULL")
SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Written(str):
    """An unquoted value of a YAML file, or all that stands behind the = of an override, as it was typed."""

    __slots__ = ()


def as_written(text: str) -> str:
    """What a person typed behind an =: `Written`, or, of a text in quotes, what is in them: "null" is so a word."""
    if text[:1] in ("'", '"'):
        with suppress(ValueError):
            quoted = read_yaml(text)
            if isinstance(quoted, str) and not isinstance(quoted, Written):
                return quoted
    return Written(text)


def read_yaml(text: str) -> Any:
    """Mappings with text for keys, lists, text, and `Written` for what is not in quotes.

    Raises `ValueError` with the reason: no YAML, a key given twice, a tag, nested too deeply, or too many values.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Reader().read(node)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(where + ", ".join(filter(None, (error.context, error.problem)))) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, token: Any) -> None:
        # The scanner looks ahead, in a time that is quadratic in the brackets.
        if self.flow_level > MAX_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        super().fetch_flow_collection_start(token)


class _Reader:
    def __init__(self) -> None:
        self.values = 0

    def read(self, node: yaml.Node) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ValueError(f"it means more than {MAX_VALUES:,} values, aliases written out")
        if isinstance(node, yaml.MappingNode) and node.tag == YAML + "map":
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == YAML + "seq":
            return [self.read(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and node.tag in PLAIN:
                return Written(node.value)
            if node.tag == YAML + "str":
                return str(node.value)
        tag = shortened(node.tag.removeprefix(YAML))
        raise ValueError(f"line {_line(node)} has the tag {tag}, which means nothing here; leave it out")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, value = self.read(key_node), self.read(value_node)
            if key_node.tag == YAML + "merge":  # <<: *others, the first of them winning
                others = value if isinstance(value, list) else [value]
                if not all(isinstance(other, dict) for other in others):
                    raise ValueError(f"line {_line(key_node)} merges what is no mapping")
                merged = {name: item for other in [*reversed(others), merged] for name, item in other.items()}
            elif not isinstance(key, str):
                raise ValueError(f"line {_line(key_node)} has a key that is no word")
            elif key in own:
                raise ValueError(f"line {_line(key_node)} gives the key {shortened(key)} a second time")
            else:
                own[str(key)] = value
        return merged | own


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def read_field(annotation: Any, value: Any) -> Any:
    """`value` for a field of that type, with all that is `Written` in it read as the type asks.

    Text is what was typed, but for null, which is None. Anything else is a number, a boolean, or a list as YAML has it.
    Raises `ValueError` with the reason: bad YAML, or a number that none can be so large.
    """
    if isinstance(value, str) and not _is_text(annotation):
        value = read_value(value)
    elif isinstance(value, Written):
        value = typed_text(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        try:
            value = float(value)  # which a field of whole numbers refuses
        except OverflowError:
            raise ValueError("it is too large for a number") from None
    if isinstance(value, list | tuple):
        inner = next((part for part in (annotation, *get_args(annotation)) if get_origin(part) is tuple), None)
        return [read_field(get_args(inner)[0] if inner else None, item) for item in value]
    return value


def typed_text(written: Written) -> str | None:
    """The text that was typed, None for null."""
    return None if written in NULL else str(written)


def read_value(written: str) -> Any:
    """A number, a boolean, None, or a list or mapping of what is `Written`; else the text."""
    if written in NULL:
        return None
    if written[0] in "[{":
        try:
            return read_yaml(written)
        except ValueError as error:
            raise ValueError(f"it is not valid YAML: {error}") from None
    word = written.lower()
    if word in BOOLEANS:
        return BOOLEANS[word]
    for base in (10, 0):  # as people count, 010 being ten; or with 0x in front
        with suppress(ValueError):
            return int(word, base)
    try:
        number = float(SPECIAL.get(word, word))
    except ValueError:
        return str(written)
    if math.isinf(number) and "inf" not in word:
        raise ValueError("it is too large for a number")
    return number


def _is_text(annotation: Any) -> bool:
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return all(isinstance(word, str) for word in parts)
    return annotation is str or (get_origin(annotation) in (Union, UnionType) and any(map(_is_text, parts)))
