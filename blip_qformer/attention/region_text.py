"""Regions as people write them: a box in each line, a number for all regions or for each."""

from __future__ import annotations

import re

from .edits import Box
from .words import read_number

SEPARATORS = re.compile(r"[\s,;]+")


def parse_boxes(text: str) -> list[Box | None]:
    """Parse boxes: ``"0, 0, 0.5, 1"`` in a line is the left half of the image.

    Args:
        text: A line for each region: x, y, width and height, in fractions of the image.

    Returns:
        A box for each line, None for an empty one.

    Raises:
        ValueError: If a line is not four numbers from 0 to 1.
    """
    boxes: list[Box | None] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = [field for field in SEPARATORS.split(line) if field]
        values = [value for field in fields if (value := read_number(field)) is not None and 0 <= value <= 1]
        if not fields:
            boxes.append(None)
        elif len(values) == len(fields) == 4:
            boxes.append(Box(*values))
        else:
            raise ValueError(
                f'Line {number} of boxes is "{line.strip()}", but a box is four numbers from 0 to 1: x, y, width and '
                "height as parts of the picture, such as 0, 0, 0.5, 1 for the left half."
            )
    return boxes


def parse_numbers(text: str, name: str, count: int) -> list[float]:
    """Parse a number for all regions, or one for each.

    Args:
        text: One number, or several with commas between them.
        name: Name of the widget, for the error.
        count: Number of regions.

    Returns:
        A number for each region; further numbers are not read.

    Raises:
        ValueError: If there are fewer, or one is negative or no number.
    """
    fields = [field for field in SEPARATORS.split(text) if field]
    values = [value for field in fields if (value := read_number(field)) is not None and value >= 0]
    if len(values) != len(fields) or not (len(values) == 1 or len(values) >= count):
        raise ValueError(
            f'{name} is "{text.strip()}", but it is one number for all regions or one for each of the {count}, with '
            "commas between them and none below 0."
        )
    return values[:count] if len(values) > 1 else values * count
