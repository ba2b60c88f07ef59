"""Values of a configuration, by the type hints of what takes them."""

from __future__ import annotations

import sys
import typing
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any

MAX_COUNT = 1_000_000  # no width, class or step count is larger; what is would exhaust the memory before it fails


def matches(value: Any, hint: Any, least: int = 1) -> bool:
    """Whether a JSON value fits a type hint. Every integer is a count of ``least`` or more, and every number finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is UnionType:
        return any(matches(value, argument, least) for argument in arguments)
    if origin is tuple:
        return type(value) is list and len(value) == len(arguments) and all(map(matches, value, arguments))
    if origin is Sequence:
        return type(value) is list and all(matches(item, arguments[0], least) for item in value)
    if hint is int:
        return type(value) is int and least <= value <= MAX_COUNT
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is (origin or hint)


def describe(hint: Any, least: int = 1) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is UnionType:
        return " or ".join(describe(argument, least) for argument in arguments)
    if origin is tuple:
        return f"[{', '.join(map(describe, arguments))}]"
    if origin is Sequence:
        return f"a list whose items are each {describe(arguments[0], least)}"
    names = {dict: "an object", str: "a string", bool: "true or false", float: "a finite number", NoneType: "null"}
    return names.get(origin or hint, f"an integer from {least} to {MAX_COUNT}")
