"""What fine-tuning adds to the small model, on held-out things (``python -m mini evaluate tuned``).

Each thing is learned from four views. At every validation on the way the judges see the images: do they pick the thing
out of twenty, do they show the background of the prompt, and how like the thing are they? The Q-Former alone, which
chooses the step that is kept, has scored the same images; how far the two agree is measured too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from ..world.backgrounds import BACKGROUNDS
from ..world.scenes import render_scene, sample_box
from .judges import Judges
from .report import CANDIDATES, TILE, held_out_subjects, picks_first

TRAINING_VIEWS = 4

_BACKGROUND_OF = {phrase: background.name for background in BACKGROUNDS for phrase in background.phrases}
PROMPTED_BACKGROUNDS = [_BACKGROUND_OF[prompt] for prompt in VALIDATION_PROMPTS]

#: Backgrounds of the views: those that no prompt asks for, so that a reproduced view never counts as a right answer.
VIEW_BACKGROUNDS = [background for background in BACKGROUNDS if background.name not in PROMPTED_BACKGROUNDS]


@dataclass(frozen=True)
class TunedSettings:
    """How many things are learned, and how.

    Args:
        things: Number of held-out things that are learned.
        steps: Number of fine-tuning steps.
        validate_every: Number of steps between two validations.
        learning_rate: Learning rate of the fine-tuning.
        rank: Rank of the LoRA.
        guidance_scale: Weight of the prompt.
        repetitions: Number of times that a prompt is repeated.
        edge: Edge of the images, in pixels.
        candidates: Number of things that an image's own is picked from.
        seed: Seed of the things, their views and the fine-tuning.
    """

    things: int = 16
    steps: int = 80
    validate_every: int = 20
    learning_rate: float = 5e-5
    rank: int = 16
    guidance_scale: float = 4.0
    repetitions: int = 4
    edge: int = 256
    candidates: int = CANDIDATES
    seed: int = 12


@dataclass
class TunedReport:
    """Means over all things, by step.

    Args:
        settings: How many things were learned, and how.
        identity: Share of right identities.
        context: Share of right backgrounds.
        likeness: Likeness to the thing, the cosine of the judge's embeddings.
        gain: Gain in likeness since step 0.
        kept: Step that the Q-Former kept, for each thing.
        kept_gain: Gain in likeness at the kept steps.
        agreement: Spearman's rank correlation between the Q-Former's likeness and the judge's.
        ended_early: Number of things whose fine-tuning ended early.
    """

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
        """Format as a Markdown table, with a paragraph about the kept steps behind it."""
        lines = [
            f"| step | identity, 1 of {self.settings.candidates} | context | likeness | gain over zero-shot |",
            "|---|---|---|---|---|",
        ]
        for step, identity in self.identity.items():
            context, likeness, gain = self.context[step], self.likeness[step], self.gain[step]
            cells = [
                "0 (zero-shot)" if step == 0 else str(step),
                f"{identity.value:.1%} ± {identity.half:.1%}",
                f"{context.value:.1%} ± {context.half:.1%}",
                f"{likeness.value:.3f}",
                "" if step == 0 else f"{gain.value:+.3f} ± {gain.half:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
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
    """A held-out thing.

    Args:
        word: Word for the thing.
        views: Images of it, of which the last is for the judge alone.
    """

    word: str
    views: list[Image.Image]


def evaluate_tuned(
    pipeline: Pipeline,
    judges: Judges,
    artwork: Path,
    settings: TunedSettings,
    progress: Callable[[str], None] = print,
) -> tuple[TunedReport, Image.Image]:
    """Fine-tune on each thing and judge the images that were sampled on the way.

    Args:
        pipeline: The model, which stays as it is.
        judges: The judges.
        artwork: An artwork folder.
        settings: How many things are learned, and how.
        progress: Function called with a line before each thing.

    Returns:
        The report, and a contact sheet: for each thing a view of it, then the first prompt's image at every validation.

    Raises:
        ValueError: There are too few held-out things.
    """
    things = make_things(artwork, settings, max(settings.things, settings.candidates))
    references = judges.embed(torch.stack([to_pixels(thing.views[-1]) for thing in things]))
    results = []
    for number, thing in enumerate(things[: settings.things]):
        progress(f"tuning {number + 1} of {settings.things}: {thing.word}")
        results.append(_finetune(pipeline, thing, settings))
    return _report(judges, references, results, settings), contact_sheet(things, results)


def make_things(artwork: Path, settings: TunedSettings, count: int) -> list[Thing]:
    """Render views of held-out things, in front of backgrounds that no prompt asks for; a function of the seed.

    Args:
        artwork: An artwork folder.
        settings: How many things are learned, and how.
        count: Number of things.

    Returns:
        The things.

    Raises:
        ValueError: There are too few held-out things.
    """
    rng = np.random.default_rng(settings.seed)
    things = []
    for number, (piece, appearance) in enumerate(held_out_subjects(artwork, rng, count)):
        backgrounds = [VIEW_BACKGROUNDS[rng.integers(len(VIEW_BACKGROUNDS))] for _ in range(TRAINING_VIEWS + 1)]
        views = [
            render_scene(piece, appearance, background, sample_box(rng), settings.edge, 100 * number + view)
            for view, background in enumerate(backgrounds)
        ]
        things.append(Thing(piece.word, views))
    if len(things) < count:
        raise ValueError(f"{len(things)} held-out things are too few for {count}: fill the artwork folder anew.")
    return things


def _finetune(pipeline: Pipeline, thing: Thing, settings: TunedSettings) -> FinetuneResult:
    """Fine-tune a copy of the U-Net, so that each thing begins with the same."""
    own = Pipeline(
        pipeline.encoder, pipeline.text_encoder, copy.deepcopy(pipeline.unet), pipeline.vae, pipeline.tokenizer
    )
    run = FinetuneRun(
        own,
        Accelerator(),
        [to_pixels(view).permute(1, 2, 0)[None] for view in thing.views[:TRAINING_VIEWS]],  # [1, H, W, 3]
        thing.word,
        FinetuneSettings(settings.steps, settings.learning_rate, seed=settings.seed),
        rank=settings.rank,
        resolution=settings.edge,
        guidance_scale=settings.guidance_scale,
        repetitions=settings.repetitions,
    )
    return run.tune(settings.validate_every, show_progress=False)


@dataclass(frozen=True)
class _Verdict:
    """The judges' verdict on a thing's images at one step: shares of right answers, and the mean likeness."""

    identity: float
    context: float
    likeness: float


def _report(
    judges: Judges, references: Tensor, results: Sequence[FinetuneResult], settings: TunedSettings
) -> TunedReport:
    """Judge the images of all validations.

    Args:
        judges: The judges.
        references: The judge's embeddings of all things, of shape [T, 64]; those of the learned things come first.
        results: Results of the learned things.
        settings: How many things were learned, and how.
    """
    report = TunedReport(settings, kept=[result.kept_step for result in results])
    report.ended_early = sum(result.scores[-1].step < settings.steps for result in results)
    verdicts = [
        [_judge(judges, references, number, images, settings.candidates) for images in result.samples]
        for number, result in enumerate(results)
    ]

    def at(step: int) -> list[_Verdict]:
        return [each[_validation_at(result, step)] for each, result in zip(verdicts, results, strict=True)]

    zero_shot = [each[0].likeness for each in verdicts]
    for step in (score.step for score in max(results, key=lambda result: len(result.scores)).scores):
        report.identity[step] = Mean.of([verdict.identity for verdict in at(step)])
        report.context[step] = Mean.of([verdict.context for verdict in at(step)])
        report.likeness[step] = Mean.of([verdict.likeness for verdict in at(step)])
        report.gain[step] = Mean.of(_gains(at(step), zero_shot))
    kept = [each[_validation_at(result, result.kept_step)] for each, result in zip(verdicts, results, strict=True)]
    report.kept_gain = Mean.of(_gains(kept, zero_shot))
    own = [score.likeness for result in results for score in result.scores]
    judged = [verdict.likeness for each in verdicts for verdict in each]
    correlation: Any = spearmanr(own, judged)  # scipy has no types
    report.agreement = float(correlation.statistic)
    return report


def _gains(verdicts: Sequence[_Verdict], zero_shot: Sequence[float]) -> list[float]:
    return [verdict.likeness - likeness for verdict, likeness in zip(verdicts, zero_shot, strict=True)]


def _judge(judges: Judges, references: Tensor, number: int, images: Tensor, candidates: int) -> _Verdict:
    """Judge the images [P, 3, H, W] of one thing, one for each prompt."""
    images = images.cpu()
    similarity = judges.embed(images) @ references.T  # [P, T]
    shown = [number, *[each for each in range(len(references)) if each != number]][:candidates]
    names = judges.name_backgrounds(images)
    right_backgrounds = [name == prompted for name, prompted in zip(names, PROMPTED_BACKGROUNDS, strict=True)]
    right_identities = picks_first(similarity[:, shown]).float().mean()
    return _Verdict(float(right_identities), float(np.mean(right_backgrounds)), float(similarity[:, number].mean()))


def _validation_at(result: FinetuneResult, step: int) -> int:
    """Find the validation that holds at a step: a fine-tuning that ended early stays as it was."""
    return max(index for index, score in enumerate(result.scores) if score.step <= step)


def contact_sheet(things: Sequence[Thing], results: Sequence[FinetuneResult]) -> Image.Image:
    """Lay the learned things out, a row for each: one of its views, then the first prompt's image at each validation.

    Args:
        things: The things, those that were learned first.
        results: Results of the learned things.

    Returns:
        The sheet, RGB.
    """
    validations = max(len(result.samples) for result in results)
    sheet = Image.new("RGB", ((1 + validations) * TILE, len(results) * TILE))
    for row, (thing, result) in enumerate(zip(things, results, strict=False)):
        images = [thing.views[0], *(to_pil_image(samples[0].cpu()) for samples in result.samples)]
        for column, image in enumerate(images):
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (column * TILE, row * TILE))
    return sheet
