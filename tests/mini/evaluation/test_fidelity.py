"""How far Subject Fidelity can be trusted: the report counts what it says it counts, and goes on where it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blip_qformer.data.collate import to_pixels
from mini.evaluation import fidelity
from mini.evaluation.fidelity import ANOTHER_THING, PROMPT, SAME_WORD, FidelitySettings, evaluate_fidelity
from mini.world.backgrounds import BACKGROUNDS
from tests.artwork import write_artwork
from tests.mini.evaluation.test_report import ColourJudges

SETTINGS = FidelitySettings(things=3, choices=2, edge=64)


class Judges(ColourJudges):
    """Backgrounds are not told apart: every logit is the same."""

    def classify_backgrounds(self, images):
        return torch.zeros(len(images), len(BACKGROUNDS))


def encode(pipeline, images, words):
    """Vectors that are the image itself in 4 x 4 points: [N, 16, 3]."""
    return F.adaptive_avg_pool2d(images - 0.5, 4).flatten(2).transpose(1, 2)


def encode_references(pipeline, cases):
    return [encode(pipeline, to_pixels(case.reference)[None], [])[0] for case in cases]


@pytest.fixture
def sampled(monkeypatch):
    """Stand in for the model: choice 2 is the reference itself, choice 1 is fainter; the prompt alone gives gray."""
    lots = []

    def sample(pipeline, cases, subjects, settings):
        lots.append(len(cases))
        gray = torch.full((3, 64, 64), 0.5)
        if subjects[0] is None:
            return [gray] * len(cases)
        faint = cases[0].noise_seed < len(cases)
        return [gray + (to_pixels(case.reference) - gray) * (0.2 if faint else 1) for case in cases]

    monkeypatch.setattr(fidelity, "sample_cases", sample)
    monkeypatch.setattr(fidelity, "_encode", encode)
    monkeypatch.setattr(fidelity, "encode_references", encode_references)
    return lots


def test_it_counts_right_answers_and_goes_on_with_what_was_sampled(tmp_path, sampled):
    artwork = write_artwork(tmp_path / "artwork")
    report, sheet = evaluate_fidelity(None, Judges(), artwork, SETTINGS, tmp_path, progress=lambda line: None)
    assert report.qformer[ANOTHER_THING].value == report.qformer[SAME_WORD].value == 1
    assert report.judges[PROMPT].value == 0  # a tie does not count
    assert "Both pick the same in" in report.table()
    assert "by chance it would be 50%" in report.table()
    assert sheet.width > sheet.height * 0.5
    assert sampled == [3] * 4  # two choices, the prompt alone, another background
    again, _ = evaluate_fidelity(None, Judges(), artwork, SETTINGS, tmp_path, progress=lambda line: None)
    assert again.table() == report.table()
    assert len(sampled) == 4
