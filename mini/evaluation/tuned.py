"""What fine-tuning is worth on the small model, on held-out things (``python -m mini evaluate tuned``).

Each thing is learned from four views. At every look on the way the judges of :mod:`.mini` see the pictures: do they
pick the thing out of twenty, are they where the prompt says, and how like the thing are they? The same pictures were
scored by the Q-Former alone, which chooses the step that is kept; how far the two agree is measured too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from blip_qformer.data.collate import to_pixels
from blip_qformer.evaluation.intervals import Mean
from blip_qformer.finetune.loop import FinetuneResult, FinetuneSettings
from blip_qformer.finetune.validation import VALIDATION_PROMPTS
from blip_qformer.pipeline import Pipeline
from blip_qformer.pipeline.subject_finetune import FinetuneRun
from blip_qformer.training.stages.base import to_pil_image

from ..world.places import PLACES
from ..world.scenes import picture_of, random_placement
from .judges import Judges
from .report import CANDIDATES, held_out_subjects, picks_first

VIEWS = 4


ASKED = {phrase: place for place in PLACES for phrase in place.phrases}  # what a prompt's words call


ASKED_PLACES = [ASKED[prompt].name for prompt in VALIDATION_PROMPTS]


SHOWN_PLACES = [place for place in PLACES if place.name not in ASKED_PLACES]  # no view can be drawn again for an answer


@dataclass(frozen=True)
class TunedSettings:
    """How much is tuned, and how.

    Args:
        things: how many held-out subjects.
        steps, learning_rate, rank: of the fine-tuning; ``every``: how many steps lie between two looks.
        guidance, repetitions: of the pictures.
        edge: of the pictures, in pixels.
        candidates: how many things a picture's own is to be picked from.
    """

    things: int = 16
    steps: int = 80
    every: int = 20
    learning_rate: float = 5e-5
    rank: int = 16
    guidance: float = 4.0
    repetitions: int = 4
    edge: int = 256
    candidates: int = CANDIDATES
    seed: int = 12


@dataclass
class TunedReport:
    """By step: shares of right identities and places, likeness to the thing, and what it gained over step 0."""

    settings: TunedSettings
    identity: dict[int, Mean] = field(default_factory=dict)
    context: dict[int, Mean] = field(default_factory=dict)
    likeness: dict[int, Mean] = field(default_factory=dict)
    gain: dict[int, Mean] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    kept_gain: Mean = Mean(0.0, 0.0)
    agreement: float = float("nan")
    ended_early: int = 0

    def table(self) -> str:
        """As Markdown."""
        lines = [
            f"| step | identity, 1 of {self.settings.candidates} | context | likeness | gain over zero-shot |",
            "|---|---|---|---|---|",
        ]
        for step, identity in self.identity.items():
            context, likeness, gain = self.context[step], self.likeness[step], self.gain[step]
            figures = [
                "0 (zero-shot)" if step == 0 else str(step),
                f"{identity.value:.1%} ± {identity.half:.1%}",
                f"{context.value:.1%} ± {context.half:.1%}",
                f"{likeness.value:.3f}",
                "" if step == 0 else f"{gain.value:+.3f} ± {gain.half:.3f}",
            ]
            lines.append(f"| {' | '.join(figures)} |")
        early = f" {self.ended_early} ended early and count as they were." if self.ended_early else ""
        return "\n".join(
            [
                *lines,
                "",
                f"Steps that the Q-Former kept: {', '.join(map(str, self.kept))}; likeness gains "
                f"{self.kept_gain.value:+.3f} ± {self.kept_gain.half:.3f} there. Its own likeness and the judge's, "
                f"over all looks at all things: Spearman's rank correlation {self.agreement:.2f}.{early}",
            ]
        )


@dataclass(frozen=True, eq=False)
class Thing:
    """A held-out thing with its views, of which the last is for the judge alone."""

    word: str
    views: list[Image.Image]


def make_things(artwork: Path, settings: TunedSettings, count: int) -> list[Thing]:
    """Held-out things, in places that no picture is asked for; a function of the seed."""
    random = np.random.default_rng(settings.seed)
    things = []
    for number, (drawing, look) in enumerate(held_out_subjects(artwork, random, count)):
        places = [SHOWN_PLACES[random.integers(len(SHOWN_PLACES))] for _ in range(VIEWS + 1)]
        views = [
            picture_of(drawing, look, place, random_placement(random), settings.edge, 100 * number + view)
            for view, place in enumerate(places)
        ]
        things.append(Thing(drawing.word, views))
    if len(things) < count:
        raise ValueError(f"{len(things)} held-out things are too few for {count}: fill the artwork folder anew.")
    return things


def evaluate_tuned(
    pipeline: Pipeline,
    judges: Judges,
    artwork: Path,
    settings: TunedSettings,
    progress: Callable[[str], None] = print,
) -> tuple[TunedReport, Image.Image]:
    """Tune each thing and judge what was drawn on the way.

    Returns:
        The report, and a contact sheet: for each thing a view of it, then the first prompt's picture at every look.
    """
    things = make_things(artwork, settings, max(settings.things, settings.candidates))
    references = judges.embed(torch.stack([to_pixels(thing.views[-1]) for thing in things]))
    outcomes = []
    for number, thing in enumerate(things[: settings.things]):
        progress(f"tuning {number + 1} of {settings.things}: {thing.word}")
        outcomes.append(_tune(pipeline, thing, settings))
    return _report(judges, references, outcomes, settings), tuned_sheet(things, outcomes)


def _tune(pipeline: Pipeline, thing: Thing, settings: TunedSettings) -> FinetuneResult:
    """With a copy of the U-Net, so that each thing begins with the same."""
    own = Pipeline(
        pipeline.encoder, pipeline.text_encoder, copy.deepcopy(pipeline.unet), pipeline.vae, pipeline.tokenizer
    )
    run = FinetuneRun(
        own,
        Accelerator(),
        [to_pixels(view).permute(1, 2, 0)[None] for view in thing.views[:VIEWS]],
        thing.word,
        FinetuneSettings(settings.steps, settings.learning_rate, seed=settings.seed),
        rank=settings.rank,
        resolution=settings.edge,
        guidance_scale=settings.guidance,
        repetitions=settings.repetitions,
    )
    return run.tune(settings.every, show_progress=False)


def _report(
    judges: Judges, references: Tensor, outcomes: Sequence[FinetuneResult], settings: TunedSettings
) -> TunedReport:
    """Judge every look; ``references`` [T, 64] are the judge's views, those of the tuned things first."""
    report = TunedReport(settings, kept=[outcome.kept_step for outcome in outcomes])
    report.ended_early = sum(outcome.scores[-1].step < settings.steps for outcome in outcomes)
    looks = [
        [_judge(judges, references, number, drawn, settings.candidates) for drawn in outcome.samples]
        for number, outcome in enumerate(outcomes)
    ]

    def at(step: int) -> list[_Look]:
        return [made[_place(outcome, step)] for made, outcome in zip(looks, outcomes, strict=True)]

    zero_shot = [made[0].likeness for made in looks]
    for step in (score.step for score in max(outcomes, key=lambda outcome: len(outcome.scores)).scores):
        report.identity[step] = Mean.of([look.identity for look in at(step)])
        report.context[step] = Mean.of([look.context for look in at(step)])
        report.likeness[step] = Mean.of([look.likeness for look in at(step)])
        report.gain[step] = Mean.of(np.subtract([look.likeness for look in at(step)], zero_shot))
    kept = [made[_place(outcome, outcome.kept_step)] for made, outcome in zip(looks, outcomes, strict=True)]
    report.kept_gain = Mean.of(np.subtract([look.likeness for look in kept], zero_shot))
    own = [score.likeness for outcome in outcomes for score in outcome.scores]
    report.agreement = float(spearmanr(own, [look.likeness for made in looks for look in made]).statistic)
    return report


@dataclass(frozen=True)
class _Look:
    """What the judges say of a thing's pictures at one step: shares of right identities and places, mean likeness."""

    identity: float
    context: float
    likeness: float


def _judge(judges: Judges, references: Tensor, number: int, drawn: Tensor, candidates: int) -> _Look:
    pictures = drawn.cpu()
    alike = judges.embed(pictures) @ references.T  # [P, T]
    shown = [number, *[each for each in range(len(references)) if each != number]][:candidates]
    named = judges.name_places(pictures)
    in_place = [name == asked for name, asked in zip(named, ASKED_PLACES, strict=True)]
    right = picks_first(alike[:, shown]).float().mean()
    return _Look(float(right), float(np.mean(in_place)), float(alike[:, number].mean()))


def _place(outcome: FinetuneResult, step: int) -> int:
    """Which of its looks holds at a step: one that ended early stays as it was."""
    return max(place for place, score in enumerate(outcome.scores) if score.step <= step)


def tuned_sheet(things: Sequence[Thing], outcomes: Sequence[FinetuneResult], edge: int = 128) -> Image.Image:
    """A row for each thing: one of its views, then the first prompt's picture at each look, zero-shot first."""
    looks = max(len(outcome.samples) for outcome in outcomes)
    sheet = Image.new("RGB", ((1 + looks) * edge, len(outcomes) * edge))
    for row, (thing, outcome) in enumerate(zip(things, outcomes, strict=False)):
        pictures = [thing.views[0], *(to_pil_image(drawn[0].cpu()) for drawn in outcome.samples)]
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((edge, edge), Image.Resampling.LANCZOS), (column * edge, row * edge))
    return sheet
