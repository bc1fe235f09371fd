"""The small model's report counts what it says it counts."""

import numpy as np
import pytest
import torch

from blip_qformer.evaluation import mini
from blip_qformer.evaluation.intervals import Share
from blip_qformer.evaluation.mini import (
    Settings,
    blending_share,
    context_share,
    evaluate,
    identity_share,
    make_cases,
    paste_reference,
)
from blip_qformer.training.stages.base import to_pixels
from blip_qformer.training.world.artwork import is_held_out_word
from blip_qformer.training.world.places import PLACES
from tests.artwork import HELD_OUT, write_artwork

SETTINGS = Settings(things=4, places=2, blends=2, steps=2, edge=64, candidates=4)


class ColourJudges:
    """Subjects are known by the colour in the middle, places by the colour of the corner."""

    def embed(self, pictures):
        middle = pictures[:, :, pictures.shape[2] // 2, pictures.shape[3] // 2] - 0.5
        return torch.nn.functional.normalize(middle, dim=1)

    def name_places(self, pictures):
        return [PLACES[round(float(picture[0, 0, 0]) * 10)].name for picture in pictures]


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork"))


@pytest.fixture
def cases(artwork):
    return make_cases(artwork, SETTINGS)


def test_cases_are_held_out_and_repeat(artwork, cases):
    assert {case.artwork.word for case in cases} == set(HELD_OUT)
    assert all(is_held_out_word(case.artwork.word) for case in cases)
    again = make_cases(artwork, SETTINGS)
    assert [(c.artwork, c.look, c.place.name) for c in cases] == [(c.artwork, c.look, c.place.name) for c in again]
    assert all(np.array_equal(a.reference, b.reference) for a, b in zip(cases, again, strict=True))


def test_a_thing_is_asked_for_in_different_places(cases):
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert first.artwork == second.artwork
        assert first.place is not second.place


def test_copies_of_the_references_are_all_right_and_strangers_wrong(cases):
    references = [to_pixels(case.reference) for case in cases]
    assert identity_share(ColourJudges(), references, cases, seed=0, candidates=4) == Share(8, 8)
    turned = references[2:] + references[:2]  # every thing looks like the next one
    assert identity_share(ColourJudges(), turned, cases, seed=0, candidates=4) == Share(0, 8)


def test_gray_pictures_have_no_identity(cases):
    nothing = [torch.full((3, 64, 64), 0.5)] * 8
    assert identity_share(ColourJudges(), nothing, cases, seed=0, candidates=4) == Share(0, 8)


def test_too_few_things_are_refused(cases):
    references = [to_pixels(case.reference) for case in cases]
    with pytest.raises(ValueError, match="4 things are too few to pick one of 20"):
        identity_share(ColourJudges(), references, cases, seed=0)


def test_context_counts_the_places_named(cases):
    pictures = [torch.full((3, 8, 8), PLACES.index(case.place) / 10) for case in cases]
    assert context_share(ColourJudges(), pictures, cases) == Share(8, 8)
    pictures[0] = torch.full((3, 8, 8), (PLACES.index(cases[0].place) + 1) % 8 / 10)
    assert context_share(ColourJudges(), pictures, cases) == Share(7, 8)


@pytest.mark.parametrize(("way", "expected"), [("steady", 2), ("wave", 0), ("still", 0)])
def test_blending_must_always_go_forward(cases, monkeypatch, way, expected):
    references = torch.stack([to_pixels(case.reference)[:, 32, 32] for case in cases])
    subjects = list(references)  # a subject's vectors are its colour, and drawing paints them

    def paint(parts, some, vectors, settings):
        pictures = [vector[:, None, None].expand(3, 64, 64) for vector in vectors]
        return {"steady": pictures, "wave": [pictures[i] for i in (0, 3, 1, 2, 4)], "still": [pictures[2]] * 5}[way]

    monkeypatch.setattr(mini, "draw_cases", paint)
    assert blending_share(None, ColourJudges(), cases, subjects, SETTINGS) == Share(expected, 2)


def test_the_pasted_reference_keeps_the_rim(cases):
    picture = torch.zeros(3, 100, 100)
    pasted = paste_reference(picture, cases[0].reference)
    assert pasted[:, :19].abs().max() == 0
    assert pasted[:, 25:75, 25:75].mean() > 0.1


def test_a_whole_report(artwork, tiny_parts):
    report, sheet = evaluate(tiny_parts, ColourJudgesOfAnything(), artwork, SETTINGS, progress=lambda line: None)
    assert list(report.identity) == [mini.GENERATED, mini.WITHOUT, mini.ANOTHER, mini.PASTED, mini.REAL]
    assert all(share.trials == 8 for share in [*report.identity.values(), *report.context.values()])
    assert report.blending.trials == 2
    assert report.table().count("\n") == 8
    assert sheet.size == (8 * 128, 3 * 128)


class ColourJudgesOfAnything(ColourJudges):
    def name_places(self, pictures):
        return [PLACES[0].name for _ in pictures]
