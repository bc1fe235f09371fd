"""Read plain data, JSON and the like, in one checked step: of bounded size, of the right types, or one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

T = TypeVar("T")

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60
_SHORT.maxlevel = 2


class PlainDataError(ValueError):
    """Data that is not what it should be; the message says where it stands, what is wrong, and what is needed."""


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a small file whole.

    Args:
        path: The file.
        limit: The most bytes that such a file may have.

    Raises:
        PlainDataError: It is larger.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise PlainDataError(f"{path} has more than {limit / 1e6:g} MB, so it is something else: choose another file.")
    return content


def parse_json(content: bytes | str, source: str) -> Any:
    """Parse JSON of any content and depth.

    Args:
        content: The text; the caller has bounded its length.
        source: Where it stands, as the subject of the error's sentence.

    Raises:
        PlainDataError: It is no JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise PlainDataError(f"{source} is not valid JSON (it is nested too deeply): download it again.") from None
    except ValueError as error:
        raise PlainDataError(f"{source} is not valid JSON ({error}): download it again.") from error


def validate(kind: type[T], content: Any, source: str) -> T:
    """Check plain values and turn them into what they describe.

    Args:
        kind: A pydantic model, a pydantic dataclass, or any type that pydantic knows.
        content: The plain values.
        source: Where they stand, as the subject of the error's sentence.

    Raises:
        PlainDataError: A name is unknown or missing, or a value is of the wrong kind or out of bounds.
    """
    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        raise PlainDataError(_sentence(error.errors(), source)) from None
    except RecursionError:
        raise PlainDataError(f"{source} is nested too deeply: use the published file.") from None


def needs(phrase: str) -> WrapValidator:
    """Replace pydantic's messages about a value by "where {phrase} is needed"."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except (ValidationError, OverflowError):
            raise ValueError(phrase) from None

    return WrapValidator(check)


def whole_number(least: int, most: int) -> BeforeValidator:
    """Accept whole numbers within bounds, both included; true and text are none."""

    def check(value: Any) -> Any:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return value

    return BeforeValidator(check)


def shown(value: Any) -> str:
    """Return a value for an error's sentence, shortened: a file can hold a number of 4,000 digits."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes out no number of more than 4,300 digits
        return "a number of thousands of digits"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _sentence(errors: Sequence[Mapping[str, Any]], source: str) -> str:
    """Make one sentence of the most telling of pydantic's errors: missing names before unknown ones before values."""
    ranks = {"missing": 0, "missing_argument": 0, "extra_forbidden": 1, "unexpected_keyword_argument": 1}
    first = min(errors, key=lambda error: ranks.get(error["type"], 2))
    name = ".".join(map(str, first["loc"]))[:100]
    if (rank := ranks.get(first["type"], 2)) < 2:
        return f"{source} does not set {name}." if rank == 0 else f"{source} sets {name}, which is not known."
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):  # several values that do not fit
        return f"{source}{', ' if name else ''}{name}: {first['ctx']['error']}."
    phrase = str(first["ctx"]["error"]) if first["type"] == "value_error" else _PHRASES.get(first["type"], first["msg"])
    what = f"sets {name} to" if name else "is"
    return f"{source} {what} {shown(first['input'])}, where {phrase} is needed."


_PHRASES = {
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "list_type": "a list",
    "string_type": "text",
    "string_unicode": "text of whole characters",
    "bool_type": "true or false",
}
