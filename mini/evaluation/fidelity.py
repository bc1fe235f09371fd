"""How far Subject Fidelity can be trusted, on held-out things (``python -m mini evaluate fidelity``).

The judges of the small world, which never saw the model, answer the same questions as the Q-Former: which of two images
shows the thing, which of two the prompt's background, and which of several images of one thing shows it best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from blip_qformer.atomic import atomic_file
from blip_qformer.data.collate import to_pixels
from blip_qformer.encoder import preprocess
from blip_qformer.evaluation.intervals import Mean, Share
from blip_qformer.imaging.contact_sheet import contact_sheet
from blip_qformer.pipeline import Pipeline
from blip_qformer.subject.fidelity import Fidelity, likeness
from blip_qformer.training.stages.base import to_pil_image

from ..world.backgrounds import BACKGROUNDS, Background
from ..world.scenes import render_scene, sample_appearance, sample_box
from .judges import Judges
from .report import TILE, Case, ReportSettings, encode_references, make_cases, sample_cases

ANOTHER_THING = "the thing, or another thing's picture"
SAME_WORD = "the thing, or what its word alone draws"
OTHER_COLOURS = "the thing, or the same drawing in other colours and shape (real pictures)"
IMAGES = "images"  # the tensor of a file of kept images
PROMPT = "the prompt's background, or another (agreement)"


@dataclass(frozen=True)
class FidelitySettings:
    """What is sampled, and how.

    Args:
        things: Number of held-out things.
        choices: Number of images of each thing that the best is picked from.
        steps: Number of DDIM steps.
        guidance_scale: Weight of the prompt.
        repetitions: Number of times that a prompt is repeated.
        edge: Edge of the images, in pixels.
        seed: Seed of the things, their scenes and the noise.
    """

    things: int = 60
    choices: int = 4
    steps: int = 20
    guidance_scale: float = 4.0
    repetitions: int = 4
    edge: int = 256
    seed: int = 13


@dataclass
class FidelityReport:
    """What the Q-Former answered, and the judges beside it.

    Args:
        settings: What was sampled, and how.
        qformer: Shares of right answers of the Q-Former, by the question.
        judges: Shares of right answers of the judges, by the question.
        same_pick: Share of things of which the Q-Former picks the image that the judges find best.
        picked: Gain in the judges' likeness of the Q-Former's pick over the mean of the thing's images.
        best: The same gain of the judges' own pick, the most that there is to gain.
    """

    settings: FidelitySettings
    qformer: dict[str, Share] = field(default_factory=dict)
    judges: dict[str, Share] = field(default_factory=dict)
    same_pick: Share = Share(0, 1)
    picked: Mean = Mean(0.0, 0.0)
    best: Mean = Mean(0.0, 0.0)

    def table(self) -> str:
        """Format as a Markdown table, with a paragraph about the picked images behind it."""
        lines = ["| which picture shows it | Q-Former right | judges right |", "|---|---|---|"]
        lines += [f"| {question} | {share} | {self.judges[question]} |" for question, share in self.qformer.items()]
        gains = [f"{gain.value:+.3f} ± {gain.half:.3f}" for gain in (self.picked, self.best)]
        return "\n".join(
            [
                *lines,
                "",
                f"Best of {self.settings.choices}: the judges find the Q-Former's pick {gains[0]} more like the thing "
                f"than the mean picture, and their own pick {gains[1]}. Both pick the same in {self.same_pick} of "
                f"things; by chance it would be {1 / self.settings.choices:.0%}.",
            ]
        )


@torch.no_grad()
def evaluate_fidelity(
    pipeline: Pipeline,
    judges: Judges,
    artwork: Path,
    settings: FidelitySettings,
    kept: Path,
    progress: Callable[[str], None] = print,
) -> tuple[FidelityReport, Image.Image]:
    """Sample images of held-out things, and let the Q-Former and the judges compare them.

    Args:
        pipeline: The model.
        judges: The judges.
        artwork: An artwork folder.
        settings: What is sampled, and how.
        kept: Folder of the images that an earlier run with these settings sampled, and of those that this one samples.
        progress: Function called with a line before each lot of images.

    Returns:
        The report, and a contact sheet: the reference, then the images with their likeness, the best marked.

    Raises:
        ValueError: There are too few things, or the model's images are not finite.
    """
    sampling = ReportSettings(
        settings.things,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        repetitions=settings.repetitions,
        edge=settings.edge,
        candidates=2,
        seed=settings.seed,
    )
    cases = make_cases(artwork, sampling)
    subjects = encode_references(pipeline, cases)
    things = len(cases)

    def sample(name: str, chosen: Sequence[Case], vectors: Sequence[Tensor | None]) -> Tensor:
        file = kept / f"{name.replace(' ', '-')}-{settings.seed}-{things}.safetensors"
        if not file.is_file():
            progress(f"drawing {len(chosen)} pictures {name}")
            images = torch.stack(sample_cases(pipeline, chosen, vectors, sampling))
            with atomic_file(file) as temporary:
                temporary.write_bytes(save({IMAGES: (images * 255).round().to(torch.uint8)}))
        return load_file(file)[IMAGES] / 255  # as a PNG holds them

    noises = [
        [replace(case, noise_seed=case.noise_seed + things * n) for case in cases] for n in range(settings.choices)
    ]
    generated = torch.stack([sample(f"of choice {n + 1}", chosen, subjects) for n, chosen in enumerate(noises)])
    alone = sample("without a subject", cases, [None] * things)
    moved = [replace(case, background=_next_background(case)) for case in noises[1]]
    elsewhere = sample("in front of another background", moved, subjects)
    real, recoloured = _real_images(cases, settings)

    report = FidelityReport(settings)
    like = _Likeness(pipeline, cases, subjects)
    judged = _JudgedLikeness(judges, cases)
    own = generated[0]
    questions = {
        ANOTHER_THING: (own, own.roll(-1, dims=0)),
        SAME_WORD: (own, alone),
        OTHER_COLOURS: (real, recoloured),
    }
    for question, (right, wrong) in questions.items():
        report.qformer[question] = _share(like(right), like(wrong))
        report.judges[question] = _share(judged(right), judged(wrong))

    prompts = [case.background.phrases[0] for case in cases]
    asked = _encode(pipeline, alone, prompts)  # as Subject Fidelity does: asked about the prompt, like its picture
    agree = [likeness(_encode(pipeline, images, prompts), asked) for images in (generated[1], elsewhere)]
    report.qformer[PROMPT] = _share(*agree)
    wanted = torch.tensor([BACKGROUNDS.index(case.background) for case in cases])
    logits = [
        judges.classify_backgrounds(images).gather(1, wanted[:, None])[:, 0] for images in (generated[1], elsewhere)
    ]
    report.judges[PROMPT] = _share(*logits)

    scores = torch.stack([like(images) for images in generated], dim=1)  # [things, choices]
    judged_scores = torch.stack([judged(images) for images in generated], dim=1)
    picks, best = scores.argmax(dim=1), judged_scores.argmax(dim=1)
    mean = judged_scores.mean(dim=1)
    report.picked = Mean.of((judged_scores.gather(1, picks[:, None])[:, 0] - mean).tolist())
    report.best = Mean.of((judged_scores.amax(dim=1) - mean).tolist())
    report.same_pick = Share(int((picks == best).sum()), things)
    return report, _sheet(cases, generated, scores)


class _Likeness:
    """The Q-Former's likeness of an image of each case to that case's subject."""

    def __init__(self, pipeline: Pipeline, cases: Sequence[Case], subjects: Sequence[Tensor]) -> None:
        self.pipeline, self.subjects = pipeline, torch.stack(list(subjects))
        self.words = [case.artwork.word for case in cases]

    def __call__(self, images: Tensor) -> Tensor:
        return likeness(_encode(self.pipeline, images, self.words), self.subjects)


class _JudgedLikeness:
    """The judges' likeness of an image of each case to that case's reference."""

    def __init__(self, judges: Judges, cases: Sequence[Case]) -> None:
        self.judges = judges
        self.references = judges.embed(torch.stack([to_pixels(case.reference) for case in cases]))

    def __call__(self, images: Tensor) -> Tensor:
        return (self.judges.embed(images) * self.references).sum(dim=-1)


def _encode(pipeline: Pipeline, images: Tensor, words: Sequence[str]) -> Tensor:
    """Encode images [N, 3, H, W], each with a word of its own, to vectors [N, 16, width]."""
    size = pipeline.encoder.config.vision.image_size
    return pipeline.encoder(preprocess(rearrange(images, "n c h w -> n h w c"), size=size), list(words))


def _share(right: Tensor, wrong: Tensor) -> Share:
    """Count how often the right image scores higher, each thing once; a tie does not count, nor NaN."""
    return Share(int((right > wrong).sum()), len(right))


def _next_background(case: Case) -> Background:
    """Return the background behind that of the case; the one of its reference is left out."""
    others = [background for background in BACKGROUNDS if background is not case.reference_background]
    return others[(others.index(case.background) + 1) % len(others)]


def _real_images(cases: Sequence[Case], settings: FidelitySettings) -> tuple[Tensor, Tensor]:
    """Render each thing in a new scene, and the same drawing in other colours and another shape in such a scene."""
    rng = np.random.default_rng(settings.seed + 1)
    images: list[list[Tensor]] = [[], []]
    for number, case in enumerate(cases):
        for found, appearance in zip(images, (case.appearance, sample_appearance(rng)), strict=True):
            box, seed = sample_box(rng), 7000 + number
            scene = render_scene(case.artwork, appearance, case.background, box, settings.edge, seed)
            found.append(to_pixels(scene))
    return torch.stack(images[0]), torch.stack(images[1])


def _sheet(cases: Sequence[Case], generated: Tensor, scores: Tensor, rows: int = 12) -> Image.Image:
    """Lay out the first things: the reference, then the images with their likeness, the best marked."""
    images, labels = [], []
    for index, case in enumerate(cases[:rows]):
        images += [to_pixels(case.reference), *generated[:, index]]
        labels += [case.artwork.word, *Fidelity(tuple(scores[index].tolist())).labels()]
    tiles = torch.nn.functional.interpolate(torch.stack(images), (TILE, TILE), mode="area")
    columns = generated.shape[0] + 1
    sheet = contact_sheet(rearrange(tiles, "n c h w -> n h w c"), columns=columns, labels=labels)
    return to_pil_image(rearrange(sheet[0], "h w c -> c h w"))
