"""What fine-tuning is worth: the report counts what it says it counts."""

from __future__ import annotations

import math

import pytest
import torch

from blip_qformer.evaluation.tuned import (
    TunedSettings,
    _report,
    evaluate_tuned,
    make_things,
    mean_and_interval,
)
from blip_qformer.training.finetune import Outcome
from blip_qformer.training.parts import new_parts
from blip_qformer.training.validation import Score
from blip_qformer.training.world.artwork import is_held_out_word
from tests import oracle, tiny
from tests.artwork import write_artwork
from tests.evaluation.test_mini import ColourJudges

SETTINGS = TunedSettings(things=2, steps=2, every=1, learning_rate=1e-3, rank=2, edge=64, candidates=3)
COLOURS = torch.eye(3)  # of the three things
PLACE_SHADES = {"snow": 0.1, "grass": 0.0, "sand": 0.2}  # the judge's, in the corner


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork"))


def picture(colour: torch.Tensor, shade: float) -> torch.Tensor:
    """A thing of a colour in a place."""
    drawn = torch.full((3, 8, 8), shade)
    drawn[:, 2:7, 2:7] = colour[:, None, None]
    return drawn


def outcome(looks: list[list[torch.Tensor]], likeness: list[float], kept: int) -> Outcome:
    scores = [Score(step, value, 1.0) for step, value in enumerate(likeness)]
    return Outcome(kept, [0.1] * (len(looks) - 1), scores, [torch.stack(look) for look in looks])


def test_it_counts_identities_places_and_gains():
    """Two things: the first is learned at step 1, the second never, and at step 1 it loses its place."""
    snow, grass, sand = PLACE_SHADES["snow"], PLACE_SHADES["grass"], PLACE_SHADES["sand"]
    red, green, blue = COLOURS
    first = outcome(
        [[picture(blue, s) for s in (snow, grass, sand)], [picture(red, s) for s in (snow, grass, sand)]], [0.2, 0.9], 1
    )
    second = outcome([[picture(green, s) for s in (snow, grass, sand)], [picture(blue, snow)] * 3], [0.8, 0.1], 1)
    references = torch.nn.functional.normalize(COLOURS - 0.5, dim=1)
    report = _report(ColourJudges(), references, [first, second], SETTINGS)
    assert (report.identity[0].successes, report.identity[0].trials) == (3, 6)
    assert (report.identity[1].successes, report.identity[1].trials) == (3, 6)
    assert (report.context[0].successes, report.context[1].successes) == (6, 4)
    difference = 1 - float(references[0] @ references[2])
    assert report.gain[1][0] == pytest.approx(0, abs=1e-6)
    assert report.gain[1][1] == pytest.approx(12.706 * difference, rel=1e-3)  # Student's t of one degree of freedom
    assert report.agreement == pytest.approx(0.894, abs=0.01)  # ranks 2 4 3 1 against 1.5 3.5 3.5 1.5
    assert report.kept == [1, 1]


def test_a_mean_comes_with_its_interval():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)
    assert math.isnan(mean_and_interval([1.0])[1])


def test_things_are_held_out_and_repeat(artwork):
    things = make_things(artwork, SETTINGS, 3)
    assert len({thing.word for thing in things}) == 3
    assert all(is_held_out_word(thing.word) for thing in things)
    assert all(len(thing.views) == 5 for thing in things)
    again = make_things(artwork, SETTINGS, 3)
    assert [thing.views[0].tobytes() for thing in things] == [thing.views[0].tobytes() for thing in again]


def test_it_tunes_and_reports(artwork):
    parts = new_parts(tiny.SIZES, seed=0)
    for seed, network in enumerate(parts.networks.values()):
        oracle.randomized(network, seed)
    before = {name: weight.clone() for name, weight in parts.unet.state_dict().items()}

    class Judges(ColourJudges):
        def name_places(self, pictures):
            return ["snow"] * len(pictures)

    report, sheet = evaluate_tuned(parts, Judges(), artwork, SETTINGS, progress=lambda text: None)
    assert all(torch.equal(weight, before[name]) for name, weight in parts.unet.state_dict().items())
    assert list(report.identity) == [0, 1, 2]
    assert report.context[2].successes == 2  # one of three prompts
    assert sheet.size == (4 * 128, 2 * 128)
    table = report.table()
    assert "| 0 (zero-shot) |" in table
    assert all(f"\n| {step} |" in table for step in (1, 2))
