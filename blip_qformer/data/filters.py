"""Which annotated things make good subjects: the filters of BLIP-Diffusion's data (arXiv 2305.14720, section 5).

Boxes are ``(left, top, right, bottom)`` as parts of the picture's width and height, as OpenImages has them.
"""

from __future__ import annotations

from ..imaging.masks import Box

LARGEST_ASPECT_RATIO = 2.0


SMALLEST_AREA, LARGEST_AREA = 0.3, 0.8


# Of a class name the last word decides, so that a "palm tree" is a tree and a "table tennis racket" is no table.
PEOPLE = frozenset(["person", "people", "man", "men", "woman", "women", "boy", "girl", "child", "children", "baby"])


CLOTHING = frozenset(
    [
        "clothing",
        "footwear",
        "accessory",
        "uniform",
        "trousers",
        "jeans",
        "shorts",
        "skirt",
        "miniskirt",
        "dress",
        "shirt",
        "coat",
        "jacket",
        "suit",
        "swimwear",
        "brassiere",
        "scarf",
        "tie",
        "sock",
        "glove",
        "belt",
        "hat",
        "fedora",
        "sombrero",
        "cap",
        "helmet",
        "crown",
        "tiara",
        "boot",
        "sandal",
        "heels",
        "skate",
        "glasses",
        "sunglasses",
        "goggles",
        "earrings",
        "necklace",
    ]
)


CLUTTER = frozenset(["tree", "plant", "houseplant", "table", "desk", "poster", "billboard"])


BODY_PART = "human "  # how OpenImages calls them: "human ear"; those of animals have other names


def refusal(
    word: str,
    is_group: bool = False,
    is_inside: bool = False,
    aspect_ratio: float | None = None,
    area: float | None = None,
) -> str | None:
    """The first reason why a thing is no subject, in a few words; None if it is one.

    Args:
        word: its class, in English.
        is_group: the box is around several of them.
        is_inside: the picture was taken from inside the thing.
        aspect_ratio: see :func:`aspect_ratio_of`; None: not known, not filtered by.
        area: the thing's part of the picture; None: likewise.
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
    """A human being, or a part of one."""
    return _last_word(word) in PEOPLE or word.strip().lower().startswith(BODY_PART)


def is_clothing(word: str) -> bool:
    """Something that a person wears."""
    return _last_word(word) in CLOTHING


def is_clutter(word: str) -> bool:
    """Something that stands around other things, or shows them."""
    return _last_word(word) in CLUTTER


def is_elongated(aspect_ratio: float) -> bool:
    """More than twice as long as wide."""
    return aspect_ratio > LARGEST_ASPECT_RATIO


def is_too_small(area: float) -> bool:
    """Less than three tenths of the picture."""
    return area < SMALLEST_AREA


def is_too_large(area: float) -> bool:
    """More than eight tenths of the picture."""
    return area > LARGEST_AREA


def aspect_ratio_of(box: Box, width: int, height: int) -> float:
    """The longer edge of a box by the shorter one, in pixels of a picture of this width and height."""
    left, top, right, bottom = box
    edges = sorted(((right - left) * width, (bottom - top) * height))
    return edges[1] / edges[0] if edges[0] > 0 else float("inf")


def area_of(box: Box) -> float:
    """A box's part of the picture."""
    left, top, right, bottom = box
    return max(0.0, right - left) * max(0.0, bottom - top)


def _last_word(name: str) -> str:
    return name.strip().lower().rpartition(" ")[2]
