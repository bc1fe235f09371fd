"""Every filter of the data, on both sides of its edge."""

from __future__ import annotations

import pytest

from blip_qformer.data import filters
from blip_qformer.data.filters import area_of, aspect_ratio_of, refusal


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("dog", None),
        ("Teddy bear", None),
        ("snowman", None),
        ("table tennis racket", None),
        ("hot dog", None),
        ("elephant ear", None),
        ("Woman", "a person"),
        (" girl ", "a person"),
        ("Human ear", "a person"),
        ("Sun hat", "clothing"),
        ("High heels", "clothing"),
        ("Sunglasses", "clothing"),
        ("Palm tree", "clutter"),
        ("Houseplant", "clutter"),
        ("plant", "clutter"),
        ("Kitchen & dining room table", "clutter"),
        ("Desk", "clutter"),
        ("poster", "clutter"),
        ("Billboard", "clutter"),
    ],
)
def test_classes(word, reason):
    assert refusal(word) == reason


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"is_group": True}, "a group"),
        ({"is_inside": True}, "a view from inside"),
        ({"aspect_ratio": 2.0}, None),
        ({"aspect_ratio": 2.01}, "too elongated"),
        ({"area": 0.3}, None),
        ({"area": 0.299}, "too small"),
        ({"area": 0.0}, "too small"),
        ({"area": 0.8}, None),
        ({"area": 0.801}, "too large"),
        ({"is_group": True, "area": 0.1}, "a group"),
    ],
)
def test_the_rest(inputs, reason):
    assert refusal("dog", **inputs) == reason


def test_the_thresholds_are_the_papers():
    assert (filters.LARGEST_ASPECT_RATIO, filters.SMALLEST_AREA, filters.LARGEST_AREA) == (2.0, 0.3, 0.8)
    assert {"tree", "plant", "table", "desk", "poster", "billboard"} <= filters.CLUTTER


def test_boxes_are_measured_in_pixels():
    box = (0.25, 0.0, 0.5, 1.0)
    assert area_of(box) == 0.25
    assert aspect_ratio_of(box, 400, 100) == 1.0
    assert aspect_ratio_of(box, 100, 100) == aspect_ratio_of((0.0, 0.25, 1.0, 0.5), 100, 100) == 4.0
    assert aspect_ratio_of((0.5, 0.0, 0.5, 1.0), 100, 100) == float("inf")
