"""Settings as plain values from YAML: types that read them, and errors that are one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from ..limits import MAX_COUNT, MAX_IMAGE_SIZE
from ..plain_data import needs, shown

Settings = TypeVar("Settings", bound="OptionGroup")


class OptionGroup(BaseModel):
    """Named settings with types, bounds and defaults; a name that is unknown is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_as_text(cls, content: Any) -> Any:
        """YAML reads a name such as ``no`` or ``3`` as another type, which pydantic would pass over."""
        return {str(name): value for name, value in content.items()} if isinstance(content, Mapping) else content


def read_settings(
    model: type[Settings], content: Mapping[str, Any], source: str, owner: str, prefix: str = ""
) -> Settings:
    """Check plain values and turn them into settings.

    Args:
        model: Class of the settings.
        content: Plain values by name, as YAML has them.
        source: Where the values stand, as the subject of an error's sentence.
        owner: What has these settings, for errors about unknown and missing names: "a run".
        prefix: What stands before each name in an error: "options.".

    Returns:
        The settings.

    Raises:
        ValueError: A name is unknown or missing, or its value is of the wrong kind or out of bounds.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError(_sentence(error.errors(), model, source, owner, prefix)) from None


def _number_in_text(value: Any) -> Any:
    """YAML reads ``1e-4`` as text, and pydantic would read true as 1."""
    if isinstance(value, bool):
        raise ValueError
    return float(value) if isinstance(value, str) else value


_FromYaml = BeforeValidator(_number_in_text)

Name = Annotated[str, Strict(), needs("a name")]
Flag = Annotated[bool, Strict(), needs("true or false")]
Count = Annotated[int, _FromYaml, Field(ge=0, le=MAX_COUNT), needs("a whole number, 0 or more,")]
PositiveCount = Annotated[int, _FromYaml, Field(ge=1, le=MAX_COUNT), needs("a whole number, 1 or more,")]
Number = Annotated[float, _FromYaml, AllowInfNan(False), Field(ge=0), needs("a number, 0 or more,")]
Fraction = Annotated[
    float, _FromYaml, AllowInfNan(False), Field(ge=0, lt=1), needs("a number, 0 or more and less than 1,")
]
Probability = Annotated[float, _FromYaml, AllowInfNan(False), Field(ge=0, le=1), needs("a number from 0 to 1")]
LatentEdge = Annotated[
    int,
    _FromYaml,
    Field(ge=8, le=MAX_IMAGE_SIZE, multiple_of=8),
    needs("a number of pixels that the VAE can halve three times, a multiple of 8,"),
]


def _sentence(
    errors: Sequence[Mapping[str, Any]], model: type[OptionGroup], source: str, owner: str, prefix: str
) -> str:
    """The most telling of pydantic's errors: unknown names before missing ones before values."""
    if unknown := [error["loc"] for error in errors if error["type"] == "extra_forbidden"]:
        group, known = unknown[0][:-1], _names_in(model, unknown[0][:-1])
        names = sorted(str(loc[-1]) for loc in unknown if loc[:-1] == group)
        told = ", ".join(".".join(map(str, (*group, _with_nearest(name, known)))) for name in names)
        return f"{source} sets {prefix}{told}, which {owner} does not have: choose from {', '.join(known)}."
    if missing := sorted(prefix + ".".join(map(str, error["loc"])) for error in errors if error["type"] == "missing"):
        return f"{source} does not set {', '.join(missing)}, which {owner} needs."
    first = errors[0]
    phrase = first["ctx"]["error"] if first["type"] == "value_error" else "a mapping"
    name = prefix + ".".join(map(str, first["loc"]))
    return f"{source} sets {name} to {shown(first['input'])}, where {phrase} is needed."


def _names_in(model: type[BaseModel], group: tuple[int | str, ...]) -> list[str]:
    """The names that a group of settings has."""
    for name in group:
        model = cast(type[BaseModel], model.model_fields[str(name)].annotation)
    return list(model.model_fields)


def _with_nearest(name: str, known: list[str]) -> str:
    nearest = get_close_matches(name, known, n=1)
    return f"{name} (did you mean {nearest[0]}?)" if nearest else name
