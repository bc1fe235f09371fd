"""What fine-tuning adds: the report counts what it says it counts."""

from __future__ import annotations

import math

import pytest
import torch

from blip_qformer.evaluation.intervals import Mean
from blip_qformer.finetune.loop import FinetuneResult
from blip_qformer.finetune.validation import Score
from mini.evaluation import tuned
from mini.evaluation.tuned import VIEW_BACKGROUNDS, TunedSettings, _report, evaluate_tuned, make_things
from mini.world.artwork import is_held_out_word
from tests import tiny
from tests.artwork import write_artwork
from tests.mini.evaluation.test_report import ColourJudges

SETTINGS = TunedSettings(things=2, steps=2, validate_every=1, learning_rate=1e-3, rank=2, edge=64, candidates=3)
COLOURS = torch.eye(3)  # of the three things
SHADES = {"snow": 0.1, "grass": 0.0, "sand": 0.2}  # the judge's, in the corner


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork"))


def image(colour: torch.Tensor, shade: float) -> torch.Tensor:
    """A thing of a colour in front of a background."""
    pixels = torch.full((3, 8, 8), shade)
    pixels[:, 2:7, 2:7] = colour[:, None, None]
    return pixels


def in_front_of_all(colour: torch.Tensor) -> list[torch.Tensor]:
    return [image(colour, shade) for shade in SHADES.values()]


def outcome(validations: list[list[torch.Tensor]], likeness: list[float], kept: int) -> FinetuneResult:
    scores = [Score(step, value, 1.0) for step, value in enumerate(likeness)]
    return FinetuneResult(kept, [0.1] * (len(validations) - 1), scores, [torch.stack(images) for images in validations])


RED, GREEN, BLUE = COLOURS
REFERENCES = torch.nn.functional.normalize(COLOURS - 0.5, dim=1)
DIFFERENCE = 1 - float(REFERENCES[0] @ REFERENCES[2])  # between a thing and what it is not


def test_it_counts_identities_backgrounds_and_gains():
    """Two things: the first is learned at step 1, the second never, and at step 1 it loses its background."""
    lost = [image(BLUE, SHADES["snow"])] * 3
    first = outcome([in_front_of_all(BLUE), in_front_of_all(RED)], [0.2, 0.9], kept=1)
    second = outcome([in_front_of_all(GREEN), lost], [0.8, 0.1], kept=0)
    report = _report(ColourJudges(), REFERENCES, [first, second], SETTINGS)
    assert (report.identity[0].value, report.identity[1].value) == (0.5, 0.5)
    assert report.context[0] == Mean(1.0, 0.0)
    assert report.context[1].value == pytest.approx(2 / 3)
    assert report.likeness[0].value == pytest.approx(1 - DIFFERENCE / 2)
    assert report.gain[1].value == pytest.approx(0, abs=1e-6)
    assert report.gain[1].half == pytest.approx(12.706 * DIFFERENCE, rel=1e-3)  # Student's t of one degree of freedom
    assert report.agreement == pytest.approx(0.894, abs=0.01)  # ranks 2 4 3 1 against 1.5 3.5 3.5 1.5
    assert report.kept == [1, 0]
    assert report.kept_gain.value == pytest.approx(DIFFERENCE / 2)  # the first gained, the second was let be


def test_one_that_ended_early_counts_as_it_was():
    first = outcome([in_front_of_all(BLUE), in_front_of_all(RED)], [0.2, 0.9], kept=1)
    second = outcome([in_front_of_all(GREEN), in_front_of_all(BLUE), in_front_of_all(GREEN)], [0.8, 0.1, 0.8], kept=2)
    report = _report(ColourJudges(), REFERENCES, [first, second], SETTINGS)
    assert report.ended_early == 1
    assert [each.value for each in report.identity.values()] == [0.5, 0.5, 1.0]
    assert "1 ended early" in report.table()


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_gray_images_have_no_identity(value):
    gray = [torch.full((3, 8, 8), value).index_fill(1, torch.tensor([0]), shade) for shade in SHADES.values()]
    report = _report(ColourJudges(), REFERENCES, [outcome([gray, gray], [0.2, 0.3], kept=1)], SETTINGS)
    assert [each.value for each in report.identity.values()] == [0.0, 0.0]


def test_things_are_held_out_and_repeat(artwork):
    things = make_things(artwork, SETTINGS, 3)
    assert len({thing.word for thing in things}) == 3
    assert all(is_held_out_word(thing.word) for thing in things)
    assert all(len(thing.views) == 5 for thing in things)
    again = make_things(artwork, SETTINGS, 3)
    assert [thing.views[0].tobytes() for thing in things] == [thing.views[0].tobytes() for thing in again]
    with pytest.raises(ValueError, match="4 held-out things are too few for 5"):
        make_things(artwork, SETTINGS, 5)


def test_views_never_show_a_background_that_is_asked_for(artwork, monkeypatch):
    """Else a view sampled again would count as the prompt's background."""
    assert len(VIEW_BACKGROUNDS) == 5
    shown = []
    original = tuned.render_scene
    monkeypatch.setattr(tuned, "render_scene", lambda *inputs: shown.append(inputs[2]) or original(*inputs))
    make_things(artwork, SETTINGS, 4)
    assert len(shown) == 4 * 5
    assert set(background.name for background in shown) <= {background.name for background in VIEW_BACKGROUNDS}
    assert {background.name for background in VIEW_BACKGROUNDS}.isdisjoint(SHADES)


def test_it_tunes_and_reports(artwork):
    pipeline = tiny.random_pipeline()
    before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}

    class Judges(ColourJudges):
        def name_backgrounds(self, images):
            return ["snow"] * len(images)

    report, sheet = evaluate_tuned(pipeline, Judges(), artwork, SETTINGS, progress=lambda text: None)
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.unet.state_dict().items())
    assert list(report.identity) == [0, 1, 2]
    assert report.context[2].value == pytest.approx(1 / 3)  # one of three prompts
    assert sheet.size == (4 * 128, 2 * 128)
    table = report.table()
    assert "| 0 (zero-shot) |" in table
    assert all(f"\n| {step} |" in table for step in (1, 2))
