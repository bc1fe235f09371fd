"""Filters of training subjects: which annotated objects BLIP-Diffusion's data keeps (arXiv 2305.14720, section 5)."""

from __future__ import annotations

from ..imaging.masks import Box

LARGEST_ASPECT_RATIO = 2.0
SMALLEST_AREA, LARGEST_AREA = 0.3, 0.8

# The last word of a class name decides, so that a "palm tree" is a tree and a "table tennis racket" is no table.
PEOPLE = frozenset({"person", "people", "man", "men", "woman", "women", "boy", "girl", "child", "children", "baby"})
# fmt: off
CLOTHING = frozenset({
    "clothing", "footwear", "accessory", "uniform", "suit", "swimwear", "trousers", "jeans", "shorts", "skirt",
    "miniskirt", "dress", "shirt", "coat", "jacket", "brassiere", "scarf", "tie", "sock", "glove", "belt", "hat",
    "fedora", "sombrero", "cap", "helmet", "crown", "tiara", "boot", "sandal", "heels", "skate", "glasses",
    "sunglasses", "goggles", "earrings", "necklace",
})
# fmt: on
CLUTTER = frozenset({"tree", "plant", "houseplant", "table", "desk", "poster", "billboard"})
BODY_PART = "human "  # as OpenImages names them: "human ear"; those of animals have other names


def refusal(
    word: str,
    is_group: bool = False,
    is_inside: bool = False,
    aspect_ratio: float | None = None,
    area: float | None = None,
) -> str | None:
    """Return the first reason why an object is no subject.

    Args:
        word: The object's class, in English.
        is_group: Whether the box is around several objects.
        is_inside: Whether the photograph was taken from inside the object.
        aspect_ratio: See :func:`aspect_ratio_of`; None skips the filter.
        area: The object's fraction of the image; None skips the filter.

    Returns:
        The reason in a few words, or None if the object is a subject.
    """
    reasons = {
        "a group": is_group,
        "a view from inside": is_inside,
        "a person": is_person(word),
        "clothing": is_clothing(word),
        "clutter": is_clutter(word),
        "too elongated": aspect_ratio is not None and is_elongated(aspect_ratio),
        "too small": area is not None and is_too_small(area),
        "too large": area is not None and is_too_large(area),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def is_person(word: str) -> bool:
    """Return whether a class is a human being or a part of one."""
    return _last_word(word) in PEOPLE or word.strip().lower().startswith(BODY_PART)


def is_clothing(word: str) -> bool:
    """Return whether a class is something that a person wears."""
    return _last_word(word) in CLOTHING


def is_clutter(word: str) -> bool:
    """Return whether a class is something that stands around other objects, or shows them."""
    return _last_word(word) in CLUTTER


def is_elongated(aspect_ratio: float) -> bool:
    """Return whether an object is more than twice as long as wide."""
    return aspect_ratio > LARGEST_ASPECT_RATIO


def is_too_small(area: float) -> bool:
    """Return whether an object covers less than three tenths of the image."""
    return area < SMALLEST_AREA


def is_too_large(area: float) -> bool:
    """Return whether an object covers more than eight tenths of the image."""
    return area > LARGEST_AREA


def aspect_ratio_of(box: Box, width: int, height: int) -> float:
    """Compute the ratio of a box's longer edge to its shorter one.

    Args:
        box: The box in fractions of the image.
        width: The image's width in pixels.
        height: The image's height in pixels.

    Returns:
        The ratio, at least 1; infinite for a box without area.
    """
    left, top, right, bottom = box
    short, long = sorted(((right - left) * width, (bottom - top) * height))
    return long / short if short > 0 else float("inf")


def area_of(box: Box) -> float:
    """Compute a box's fraction of the image."""
    left, top, right, bottom = box
    return max(0.0, right - left) * max(0.0, bottom - top)


def _last_word(name: str) -> str:
    return name.strip().lower().rpartition(" ")[2]
