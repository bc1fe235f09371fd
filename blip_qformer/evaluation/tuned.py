"""What fine-tuning is worth on the small model, on held-out things (``blip-qformer evaluate tuned``).

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
from scipy.stats import spearmanr, t
from torch import Tensor

from ..training.diffusers_run import FinetuneRun
from ..training.finetune import FinetuneSettings, Outcome
from ..training.parts import ModelParts
from ..training.stages.base import to_picture, to_pixels
from ..training.validation import VALIDATION_PROMPTS
from ..training.world.places import PLACES
from ..training.world.scenes import picture_of, random_look, random_place, random_placement
from ..training.world.source import readable_artwork
from .intervals import Share
from .judges import Judges
from .mini import CANDIDATES

VIEWS = 4
ASKED = {phrase: place.name for place in PLACES for phrase in place.phrases}  # what a prompt's words call


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
    """By step: shares of right identities and places, and the mean likeness to the thing."""

    settings: TunedSettings
    identity: dict[int, Share] = field(default_factory=dict)
    context: dict[int, Share] = field(default_factory=dict)
    likeness: dict[int, float] = field(default_factory=dict)
    gain: dict[int, tuple[float, float]] = field(default_factory=dict)  # over step 0, and half its 95 % interval
    kept: list[int] = field(default_factory=list)
    agreement: float = float("nan")
    kept_gain: tuple[float, float] = (0.0, 0.0)

    def table(self) -> str:
        """As Markdown."""
        lines = [
            f"| step | identity, 1 of {self.settings.candidates} | context | likeness | gain over zero-shot |",
            "|---|---|---|---|---|",
        ]
        for step, identity in self.identity.items():
            gain = "" if step == 0 else f"{self.gain[step][0]:+.3f} ± {self.gain[step][1]:.3f}"
            name = "0 (zero-shot)" if step == 0 else str(step)
            lines.append(f"| {name} | {identity} | {self.context[step]} | {self.likeness[step]:.3f} | {gain} |")
        return "\n".join(
            [
                *lines,
                "",
                f"Steps that the Q-Former kept: {', '.join(map(str, self.kept))}; likeness gains "
                f"{self.kept_gain[0]:+.3f} ± {self.kept_gain[1]:.3f} there. Its own likeness and the judge's, over all "
                f"looks at all things: Spearman's rank correlation {self.agreement:.2f}.",
            ]
        )


@dataclass(frozen=True, eq=False)
class Thing:
    """A held-out thing with its views, of which the last is for the judge alone."""

    word: str
    views: list[Image.Image]


def make_things(artwork: Path, settings: TunedSettings, count: int) -> list[Thing]:
    """Held-out things; a function of the seed."""
    random = np.random.default_rng(settings.seed)
    drawings = readable_artwork(artwork, "held-out")
    words = sorted({each.word for each in drawings})
    things = []
    for index in random.permutation(len(words))[:count]:
        same_word = [each for each in drawings if each.word == words[index]]
        drawing, look = same_word[random.integers(len(same_word))], random_look(random)
        views = [
            picture_of(drawing, look, random_place(random), random_placement(random), settings.edge, 100 * index + view)
            for view in range(VIEWS + 1)
        ]
        things.append(Thing(drawing.word, views))
    return things


def evaluate_tuned(
    parts: ModelParts,
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
        outcomes.append(_tune(parts, thing, settings))
    return _report(judges, references, outcomes, settings), tuned_sheet(things, outcomes)


def _tune(parts: ModelParts, thing: Thing, settings: TunedSettings) -> Outcome:
    """With a copy of the U-Net, so that each thing begins with the same."""
    own = ModelParts(parts.encoder, parts.text_encoder, copy.deepcopy(parts.unet), parts.vae, parts.tokenizer)
    run = FinetuneRun(
        own,
        Accelerator(),
        [to_pixels(view).permute(1, 2, 0)[None] for view in thing.views[:VIEWS]],
        thing.word,
        FinetuneSettings(settings.steps, settings.learning_rate, seed=settings.seed),
        rank=settings.rank,
        resolution=settings.edge,
        guidance=settings.guidance,
        repetitions=settings.repetitions,
    )
    return run.tune(settings.every, show=False)


def _report(judges: Judges, references: Tensor, outcomes: Sequence[Outcome], settings: TunedSettings) -> TunedReport:
    report = TunedReport(settings, kept=[outcome.kept for outcome in outcomes])
    steps = [score.step for score in outcomes[0].scores]
    similarity = {step: [] for step in steps}  # for each thing the mean of its pictures
    own, judged = [], []
    for place, step in enumerate(steps):
        right = in_place = pictures = 0
        for number, outcome in enumerate(outcomes):
            drawn = outcome.drawn[place].cpu()
            alike = judges.embed(drawn) @ references.T  # [P, things]
            candidates = [number, *[each for each in range(len(references)) if each != number]][: settings.candidates]
            right += int((alike[:, candidates].argmax(dim=1) == 0).sum())
            named = judges.name_places(drawn)
            in_place += sum(name == ASKED[prompt] for name, prompt in zip(named, VALIDATION_PROMPTS, strict=True))
            pictures += len(drawn)
            similarity[step].append(float(alike[:, number].mean()))
            own.append(outcome.scores[place].likeness)
            judged.append(similarity[step][-1])
        report.identity[step], report.context[step] = Share(right, pictures), Share(in_place, pictures)
        report.likeness[step] = float(np.mean(similarity[step]))
        report.gain[step] = mean_and_interval(np.subtract(similarity[step], similarity[0]))
    at_kept = [similarity[step][number] for number, step in enumerate(report.kept)]
    report.kept_gain = mean_and_interval(np.subtract(at_kept, similarity[0]))
    report.agreement = float(spearmanr(own, judged).statistic)
    return report


def mean_and_interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean over things, and half of its 95 % interval by Student's t."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * error)


def tuned_sheet(things: Sequence[Thing], outcomes: Sequence[Outcome], edge: int = 128) -> Image.Image:
    """A row for each thing: one of its views, then the first prompt's picture at each look, zero-shot first."""
    looks = len(outcomes[0].drawn)
    sheet = Image.new("RGB", ((1 + looks) * edge, len(outcomes) * edge))
    for row, (thing, outcome) in enumerate(zip(things, outcomes, strict=False)):
        pictures = [thing.views[0], *(to_picture(drawn[0].cpu()) for drawn in outcome.drawn)]
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((edge, edge), Image.Resampling.LANCZOS), (column * edge, row * edge))
    return sheet
