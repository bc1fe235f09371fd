"""The small model's report counts what it says it counts."""

import numpy as np
import pytest
import torch

from blip_qformer.data.collate import to_pixels
from blip_qformer.evaluation.intervals import Share
from mini.evaluation import report as mini
from mini.evaluation.report import (
    BLEND_WEIGHTS,
    ReportSettings,
    blended_pairs,
    blending_share,
    context_share,
    cross_fade,
    evaluate,
    identity_share,
    make_cases,
    paste_reference,
    sample_blends,
)
from mini.world.artwork import is_held_out_word
from mini.world.backgrounds import BACKGROUNDS
from tests.artwork import HELD_OUT, write_artwork

SETTINGS = ReportSettings(things=4, backgrounds=2, blends=2, steps=2, edge=64, candidates=4)


class ColourJudges:
    """Subjects are known by the colour in the middle, backgrounds by the colour of the corner."""

    def embed(self, images):
        middle = images[:, :, images.shape[2] // 2, images.shape[3] // 2] - 0.5
        return torch.nn.functional.normalize(middle, dim=1)

    def name_backgrounds(self, images):
        return [BACKGROUNDS[round(float(image[0, 0, 0]) * 10) % len(BACKGROUNDS)].name for image in images]


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
    assert [(c.artwork, c.appearance, c.background.name) for c in cases] == [
        (c.artwork, c.appearance, c.background.name) for c in again
    ]
    assert all(np.array_equal(a.reference, b.reference) for a, b in zip(cases, again, strict=True))


def test_a_thing_is_asked_for_in_front_of_different_backgrounds(cases):
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert first.artwork == second.artwork
        assert first.background is not second.background
    assert all(case.background is not case.reference_background for case in cases)


def test_copies_of_the_references_are_all_right_and_strangers_wrong(cases):
    references = [to_pixels(case.reference) for case in cases]
    assert identity_share(ColourJudges(), references, cases, seed=0, candidates=4) == Share(8, 8)
    turned = references[2:] + references[:2]  # every thing looks like the next one
    assert identity_share(ColourJudges(), turned, cases, seed=0, candidates=4) == Share(0, 8)


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_gray_images_have_no_identity(cases, value):
    nothing = [torch.full((3, 64, 64), value)] * 8
    assert identity_share(ColourJudges(), nothing, cases, seed=0, candidates=4) == Share(0, 8)


def test_too_few_things_are_refused_before_anything_is_sampled(artwork):
    with pytest.raises(ValueError, match="4 things are too few to pick one of 20"):
        make_cases(artwork, ReportSettings(things=4))


def test_context_counts_the_backgrounds_named(cases):
    images = [torch.full((3, 8, 8), BACKGROUNDS.index(case.background) / 10) for case in cases]
    assert context_share(ColourJudges(), images, cases) == Share(8, 8)
    images[0] = torch.full((3, 8, 8), (BACKGROUNDS.index(cases[0].background) + 1) % 8 / 10)
    assert context_share(ColourJudges(), images, cases) == Share(7, 8)


@pytest.mark.parametrize(("way", "expected"), [("steady", 2), ("wave", 0), ("still", 0)])
def test_blending_must_always_go_forward(cases, monkeypatch, way, expected):
    references = torch.stack([to_pixels(case.reference)[:, 32, 32] for case in cases])
    subjects = list(references)  # a subject's vectors are its colour, and sampling paints them

    def sample(pipeline, some, vectors, settings):
        images = [vector[:, None, None].expand(3, 64, 64) for vector in vectors]
        return {"steady": images, "wave": [images[i] for i in (0, 3, 1, 2, 4)], "still": [images[2]] * 5}[way]

    monkeypatch.setattr(mini, "sample_cases", sample)
    pairs = blended_pairs(cases, SETTINGS)
    assert pairs == [(0, 2), (4, 6)]  # each thing is asked for in front of two backgrounds
    sampled = sample_blends(None, cases, pairs, subjects, SETTINGS)
    assert blending_share(ColourJudges(), sampled, cases, pairs) == Share(expected, 2)


def test_a_fade_goes_from_one_image_to_the_other(cases):
    first, second = cases[0].reference, cases[2].reference
    faded = [np.asarray(image, float) for image in cross_fade(first, second)]
    assert np.array_equal(faded[0], np.asarray(first, float))
    assert np.array_equal(faded[-1], np.asarray(second, float))
    assert np.abs(faded[2] - (faded[0] + faded[-1]) / 2).max() <= 1


def test_the_pasted_reference_keeps_the_rim(cases):
    image = torch.zeros(3, 100, 100)
    pasted = paste_reference(image, cases[0].reference)
    assert pasted[:, :19].abs().max() == 0
    assert pasted[:, 25:75, 25:75].mean() > 0.1


class Painter:
    """Stands in for the model: an image is its subject's colour in front of the prompt's background."""

    def __init__(self):
        self.asked: list[tuple[str, int]] = []  # prompt, noise

    def encode_references(self, pipeline, cases):
        return [to_pixels(case.reference)[:, 32, 32] for case in cases]

    def sample(self, pipeline, prompts, subjects, *, noise, num_inference_steps, guidance_scale):
        self.asked += [
            (prompt, round(float(each[0, 0, 0]) * 1000)) for prompt, each in zip(prompts, noise, strict=True)
        ]
        images = []
        for prompt, subject in zip(prompts, subjects, strict=True):
            (background,) = [background for background in BACKGROUNDS if background.phrases[0] in prompt]
            image = torch.full((3, 64, 64), BACKGROUNDS.index(background) / 10)
            image[:, 16:48, 16:48] = 0.5 if subject is None else subject[:, None, None]
            images.append(image)
        return torch.stack(images)


def test_a_whole_report(artwork, cases, monkeypatch):
    """Of a model that does everything right, each row answers its own question."""
    painter = Painter()
    monkeypatch.setattr(mini, "encode_references", painter.encode_references)
    monkeypatch.setattr(mini, "sample_images", painter.sample)
    report, sheet = evaluate(None, ColourJudges(), artwork, SETTINGS, progress=lambda line: None)
    counts = {name: (report.identity[name].successes, report.blending[name].successes) for name in report.identity}
    assert counts[mini.GENERATED] == (8, 2)
    assert counts[mini.WITHOUT] == (0, 0)
    assert counts[mini.ANOTHER][0] == 0
    assert counts[mini.PASTED] == (8, 2)
    assert counts[mini.REAL][1] == 2
    assert all(share.trials == 8 for share in [*report.identity.values(), *report.context.values()])
    assert all(share.trials == 2 for share in report.blending.values())
    for name in (mini.GENERATED, mini.WITHOUT, mini.ANOTHER, mini.PASTED):
        assert report.context[name].successes == 8

    once, rest = painter.asked[:8], painter.asked[8:]
    assert rest[:8] == rest[8:16] == once  # the same noise for the same case, whatever the subject
    assert len({noise for _, noise in once}) == 8
    for (prompt, _), case in zip(once, cases, strict=True):
        assert case.artwork.word in prompt
        assert case.background.phrases[0] in prompt
    assert len(rest) == 16 + 2 * 2 * len(BLEND_WEIGHTS)

    assert [line.split(" | ")[0] for line in report.table().splitlines()[2:]] == [f"| {name}" for name in counts]
    assert sheet.size == (8 * 128, 3 * 128)


def test_the_model_itself_is_asked(artwork, tiny_pipeline, monkeypatch):
    """Its encoder about each reference, and its networks for each image."""
    asked = []
    monkeypatch.setattr(
        tiny_pipeline.encoder, "forward", lambda pixels, words: asked.append(words) or pixels.new_ones(1, 16, 32)
    )
    cases = make_cases(artwork, SETTINGS)
    vectors = mini.encode_references(tiny_pipeline, cases)
    assert asked == [[case.artwork.word] for case in cases]
    sampled = mini.sample_cases(tiny_pipeline, cases, vectors, SETTINGS)
    assert [image.shape for image in sampled] == [(3, 64, 64)] * 8
    assert not torch.equal(sampled[0], sampled[1])
