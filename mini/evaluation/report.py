"""The small model's report: held-out things, three questions, three baselines (``python -m mini evaluate report``).

Identity: does a generated image pick its reference out of twenty candidates? Context: does it show the background of
the prompt? Blending: does the likeness move steadily from one subject to the other? The baselines answer the same
questions with the same model: without a subject, with another thing's subject, and with the reference pasted into an
image that was sampled without a subject; where two subjects are blended, with one reference faded into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip_qformer.data.collate import to_pixels
from blip_qformer.encoder import preprocess
from blip_qformer.evaluation.intervals import Share
from blip_qformer.pipeline import Pipeline
from blip_qformer.pipeline.sample import sample_images
from blip_qformer.prompt import compose_prompt
from blip_qformer.training.stages.base import to_pil_image

from ..world.artwork import Artwork
from ..world.backgrounds import BACKGROUNDS, Background
from ..world.scenes import Appearance, render_scene, sample_appearance, sample_background, sample_box
from ..world.source import readable_artwork
from .judges import Judges

CANDIDATES = 20
BLEND_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the second subject
PASTED_SIZE = 0.6  # of the image's edge
BATCH_SIZE = 8
TILE = 128  # pixels, in contact sheets

GENERATED = "with its subject"
WITHOUT = "without a subject"
ANOTHER = "with another thing's subject"
PASTED = "its reference pasted in"
REAL = "real pictures (what the judges are worth)"


@dataclass(frozen=True)
class ReportSettings:
    """What is sampled, and how.

    Args:
        things: Number of held-out subjects.
        backgrounds: Number of backgrounds that each is asked for in front of.
        blends: Number of pairs of subjects that are blended, each subject in one pair.
        steps: Number of DDIM steps.
        guidance_scale: Weight of the prompt.
        repetitions: Number of times that a prompt is repeated, as Subject Prompt Compose does.
        edge: Edge of the images, in pixels.
        candidates: Number of references that an image's own is picked from.
        seed: Seed of the subjects and backgrounds.
    """

    things: int = 60
    backgrounds: int = 1
    blends: int = 30
    steps: int = 20
    guidance_scale: float = 4.0
    repetitions: int = 4
    edge: int = 256
    candidates: int = CANDIDATES
    seed: int = 11


@dataclass(frozen=True, eq=False)
class Case:
    """One image to be sampled.

    Args:
        artwork: The subject's artwork.
        appearance: The subject's appearance.
        reference: Image that the model is shown.
        reference_background: Background of the reference.
        background: Background that the prompt asks for.
        noise_seed: Seed of the initial noise.
    """

    artwork: Artwork
    appearance: Appearance
    reference: Image.Image
    reference_background: Background
    background: Background
    noise_seed: int


@dataclass
class Report:
    """Shares of right identities, right backgrounds and steady blends, for each way to generate images.

    Args:
        identity: Shares of right identities, by the way's name.
        context: Shares of right backgrounds, by the way's name.
        blending: Shares of steady blends, by the way's name.
        settings: What was sampled, and how.
    """

    identity: dict[str, Share] = field(default_factory=dict)
    context: dict[str, Share] = field(default_factory=dict)
    blending: dict[str, Share] = field(default_factory=dict)
    settings: ReportSettings = field(default_factory=ReportSettings)

    def table(self) -> str:
        """Format as a Markdown table; every share with its 95 % interval."""
        chances = f"identity, 1 of {self.settings.candidates} | context, 1 of {len(BACKGROUNDS)}"
        lines = [f"| drawn | {chances} | blending, steady |", "|---|---|---|---|"]
        for name in self.identity:
            lines.append(f"| {name} | {self.identity[name]} | {self.context[name]} | {self.blending[name]} |")
        return "\n".join(lines)


def evaluate(
    pipeline: Pipeline,
    judges: Judges,
    artwork: Path,
    settings: ReportSettings,
    progress: Callable[[str], None] = print,
) -> tuple[Report, Image.Image]:
    """Generate all images and judge them.

    Args:
        pipeline: The model.
        judges: The judges.
        artwork: An artwork folder.
        settings: What is sampled, and how.
        progress: Function called with a line before each lot of images.

    Returns:
        The report, and a contact sheet: reference, without a subject, with its subject.

    Raises:
        ValueError: There are too few things, or the model's images are not finite.
    """
    cases = make_cases(artwork, settings)
    subjects = encode_references(pipeline, cases)
    images = _generate(pipeline, cases, subjects, settings, progress)
    report = Report(settings=settings)
    for name, generated in images.items():
        report.identity[name] = identity_share(judges, generated, cases, settings.seed, settings.candidates)
        report.context[name] = context_share(judges, generated, cases)

    pairs = blended_pairs(cases, settings)
    progress(f"blending {len(pairs)} pairs")
    blends = _blend(pipeline, cases, pairs, subjects, images[WITHOUT], settings)
    report.blending = {name: blending_share(judges, generated, cases, pairs) for name, generated in blends.items()}
    return report, contact_sheet(cases, images[WITHOUT], images[GENERATED])


def make_cases(artwork: Path, settings: ReportSettings) -> list[Case]:
    """Choose the held-out subjects and the backgrounds they are asked for; a function of the seed.

    Args:
        artwork: An artwork folder.
        settings: What is sampled, and how.

    Returns:
        The cases, those of one subject behind each other.

    Raises:
        ValueError: There are too few things to pick one of so many candidates.
    """
    rng = np.random.default_rng(settings.seed)
    cases = []
    for number, (piece, appearance) in enumerate(held_out_subjects(artwork, rng, settings.things)):
        shown = sample_background(rng)
        reference = render_scene(piece, appearance, shown, sample_box(rng), settings.edge, 1000 + number)
        others = [background for background in BACKGROUNDS if background is not shown]
        for index in rng.permutation(len(others))[: settings.backgrounds]:
            cases.append(Case(piece, appearance, reference, shown, others[index], noise_seed=len(cases)))
    things = len({case.artwork.word for case in cases})
    if things < settings.candidates:
        raise ValueError(f"{things} things are too few to pick one of {settings.candidates}: draw more things.")
    return cases


def held_out_subjects(artwork: Path, rng: np.random.Generator, count: int) -> Iterator[tuple[Artwork, Appearance]]:
    """Sample things that were never trained on, each with another word.

    They are sampled one by one: numbers that the caller takes from ``rng`` in between change those that follow.

    Args:
        artwork: An artwork folder.
        rng: Source of randomness.
        count: Highest number of things.

    Yields:
        A piece of artwork and its appearance.
    """
    pieces = readable_artwork(artwork, "held-out")
    words = sorted({each.word for each in pieces})
    for index in rng.permutation(len(words))[:count]:
        same_word = [each for each in pieces if each.word == words[index]]
        yield same_word[rng.integers(len(same_word))], sample_appearance(rng)


@torch.no_grad()
def encode_references(pipeline: Pipeline, cases: Sequence[Case]) -> list[Tensor]:
    """Encode each case's reference.

    Args:
        pipeline: The model.
        cases: The cases.

    Returns:
        Subject vectors of shape [16, width] for each case.
    """
    size = pipeline.encoder.config.vision.image_size
    vectors = []
    for case in cases:
        image = to_pixels(case.reference).permute(1, 2, 0)[None]  # [1, H, W, 3]
        vectors.append(pipeline.encoder(preprocess(image, size=size), [case.artwork.word])[0])
    return vectors


def sample_cases(
    pipeline: Pipeline, cases: Sequence[Case], subjects: Sequence[Tensor | None], settings: ReportSettings
) -> list[Tensor]:
    """Sample an image of each case, from the same noise for the same case, whatever the subject.

    Args:
        pipeline: The model.
        cases: The cases.
        subjects: Subject vectors of shape [16, width] for each case, or None for the prompt alone.
        settings: What is sampled, and how.

    Returns:
        Images of shape [3, H, W] in 0..1.

    Raises:
        ValueError: An image is not finite.
    """
    images: list[Tensor] = []
    for start in range(0, len(cases), BATCH_SIZE):
        batch = cases[start : start + BATCH_SIZE]
        noise = torch.stack([_noise(case.noise_seed, settings.edge) for case in batch])
        images += sample_images(
            pipeline,
            [
                compose_prompt(case.background.phrases[0], case.artwork.word, repetitions=settings.repetitions)
                for case in batch
            ],
            subjects[start : start + BATCH_SIZE],
            noise=noise,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
        ).cpu()
    if any(not image.isfinite().all() for image in images):
        raise ValueError(
            "The model draws pictures that are not all numbers: train it anew, or take an older checkpoint."
        )
    return images


def _generate(
    pipeline: Pipeline,
    cases: Sequence[Case],
    subjects: Sequence[Tensor],
    settings: ReportSettings,
    progress: Callable[[str], None],
) -> dict[str, list[Tensor]]:
    """Make an image of each case in every way, by the way's name."""
    vectors: dict[str, Sequence[Tensor | None]] = {
        GENERATED: subjects,
        WITHOUT: [None] * len(cases),
        ANOTHER: _rotated(subjects, settings.backgrounds),
    }
    images = {}
    for name, each in vectors.items():
        progress(f"drawing {len(cases)} pictures {name}")
        images[name] = sample_cases(pipeline, cases, each, settings)
    images[PASTED] = [
        paste_reference(image, case.reference) for image, case in zip(images[WITHOUT], cases, strict=True)
    ]
    rng = np.random.default_rng(settings.seed + 1)
    images[REAL] = [
        to_pixels(
            render_scene(
                case.artwork,
                case.appearance,
                case.background,
                sample_box(rng),
                settings.edge,
                5000 + case.noise_seed,
            )
        )
        for case in cases
    ]
    return images


def paste_reference(image: Tensor, reference: Image.Image) -> Tensor:
    """Paste the reference, background and all, into the middle of an image.

    Args:
        image: The image, of shape [3, H, W] in 0..1.
        reference: The reference.

    Returns:
        The new image, of the same shape.
    """
    canvas = to_pil_image(image)
    size = round(PASTED_SIZE * canvas.width)
    corner = (canvas.width - size) // 2
    canvas.paste(reference.resize((size, size)), (corner, corner))
    return to_pixels(canvas)


def identity_share(
    judges: Judges, images: Sequence[Tensor], cases: Sequence[Case], seed: int, candidates: int = CANDIDATES
) -> Share:
    """Count how often an image is closer to its own reference than to other candidates, which have other words.

    Args:
        judges: The judges.
        images: Images of shape [3, H, W] in 0..1, one for each case.
        cases: The cases.
        seed: Seed of the choice of candidates.
        candidates: Number of candidates, the own reference included.

    Returns:
        The share of images that pick their reference.
    """
    rng = np.random.default_rng(seed)
    references = judges.embed(torch.stack([to_pixels(case.reference) for case in cases]))
    embeddings = judges.embed(torch.stack(list(images)))
    right = 0
    for index, case in enumerate(cases):
        others = [i for i, other in enumerate(cases) if other.artwork.word != case.artwork.word]
        others = _one_of_each_word(others, cases, rng)[: candidates - 1]
        right += int(picks_first(references[[index, *others]] @ embeddings[index]))
    return Share(right, len(cases))


def picks_first(similarity: Tensor) -> Tensor:
    """Say whether the first candidate is the most similar: a tie does not count, nor NaN.

    Args:
        similarity: Similarities to the candidates, of shape [..., C].

    Returns:
        Booleans of shape [...].
    """
    return similarity[..., 0] > similarity[..., 1:].amax(dim=-1)


def context_share(judges: Judges, images: Sequence[Tensor], cases: Sequence[Case]) -> Share:
    """Count how often an image shows the background of its prompt.

    Args:
        judges: The judges.
        images: Images of shape [3, H, W] in 0..1, one for each case.
        cases: The cases.

    Returns:
        The share of images in front of the right background.
    """
    names = judges.name_backgrounds(torch.stack(list(images)))
    return Share(sum(name == case.background.name for name, case in zip(names, cases, strict=True)), len(cases))


def blended_pairs(cases: Sequence[Case], settings: ReportSettings) -> list[tuple[int, int]]:
    """Pair the first cases of two things each, no thing twice.

    Args:
        cases: The cases.
        settings: What is sampled, and how.

    Returns:
        Indices of the paired cases.
    """
    firsts = range(0, len(cases), settings.backgrounds)
    return list(zip(firsts[::2], firsts[1::2], strict=False))[: settings.blends]


def sample_blends(
    pipeline: Pipeline,
    cases: Sequence[Case],
    pairs: Sequence[tuple[int, int]],
    subjects: Sequence[Tensor],
    settings: ReportSettings,
) -> list[list[Tensor]]:
    """Sample the blends of each pair, all from the noise and with the prompt of the first case.

    Args:
        pipeline: The model.
        cases: The cases.
        pairs: Indices of the paired cases.
        subjects: Subject vectors of shape [16, width] for each case.
        settings: What is sampled, and how.

    Returns:
        For each pair an image of shape [3, H, W] in 0..1 at every weight of the second subject.
    """
    return [
        sample_cases(
            pipeline,
            [cases[first]] * len(BLEND_WEIGHTS),
            [(1 - weight) * subjects[first] + weight * subjects[second] for weight in BLEND_WEIGHTS],
            settings,
        )
        for first, second in pairs
    ]


def cross_fade(first: Image.Image, second: Image.Image) -> list[Image.Image]:
    """Fade an image into another, pixel by pixel.

    Args:
        first: The first image.
        second: The second image.

    Returns:
        The mixed image at every weight of a blend.
    """
    return [Image.blend(first, second, weight) for weight in BLEND_WEIGHTS]


def _blend(
    pipeline: Pipeline,
    cases: Sequence[Case],
    pairs: Sequence[tuple[int, int]],
    subjects: Sequence[Tensor],
    without_subject: Sequence[Tensor],
    settings: ReportSettings,
) -> dict[str, list[list[Tensor]]]:
    """Make the blends of each pair in every way, by the way's name."""
    faded = [cross_fade(cases[first].reference, cases[second].reference) for first, second in pairs]
    prompts_images = [without_subject[first] for first, _ in pairs]
    return {
        GENERATED: sample_blends(pipeline, cases, pairs, subjects, settings),
        WITHOUT: [[image] * len(BLEND_WEIGHTS) for image in prompts_images],
        ANOTHER: sample_blends(pipeline, cases, pairs, _rotated(subjects, 2 * settings.backgrounds), settings),
        PASTED: [
            [paste_reference(image, reference) for reference in references]
            for image, references in zip(prompts_images, faded, strict=True)
        ],
        REAL: [[to_pixels(reference) for reference in references] for references in faded],
    }


def blending_share(
    judges: Judges,
    images: Sequence[Sequence[Tensor]],
    cases: Sequence[Case],
    pairs: Sequence[tuple[int, int]],
) -> Share:
    """Count how often likeness moves from the first subject to the second at every step of a blend, never back.

    Likeness to the second minus likeness to the first is compared over the weights 0, 1/4, 1/2, 3/4, 1.

    Args:
        judges: The judges.
        images: For each pair the images of its blend, of shape [3, H, W] in 0..1.
        cases: The cases.
        pairs: Indices of the paired cases.

    Returns:
        The share of steady blends.
    """
    references = judges.embed(torch.stack([to_pixels(case.reference) for case in cases]))
    steady = 0
    for (first, second), blend in zip(pairs, images, strict=True):
        likeness = judges.embed(torch.stack(list(blend))) @ (references[second] - references[first])
        steady += bool((likeness.diff() > 0).all())  # a model that ignores its subjects does not move
    return Share(steady, len(pairs))


def contact_sheet(
    cases: Sequence[Case], without_subject: Sequence[Tensor], with_subject: Sequence[Tensor], columns: int = 12
) -> Image.Image:
    """Lay some cases out, a column for each: reference, without a subject, with its subject.

    Args:
        cases: The cases.
        without_subject: Images of shape [3, H, W] in 0..1, one for each case.
        with_subject: Images of shape [3, H, W] in 0..1, one for each case.
        columns: Highest number of columns.

    Returns:
        The sheet, RGB.
    """
    columns = min(columns, len(cases))
    sheet = Image.new("RGB", (columns * TILE, 3 * TILE))
    for column, index in enumerate(np.linspace(0, len(cases) - 1, columns).round().astype(int)):
        rows = (cases[index].reference, to_pil_image(without_subject[index]), to_pil_image(with_subject[index]))
        for row, image in enumerate(rows):
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (column * TILE, row * TILE))
    return sheet


def _rotated(subjects: Sequence[Tensor], offset: int) -> list[Tensor]:
    """Give each case the subject of the case that is ``offset`` further on."""
    return [subjects[(index + offset) % len(subjects)] for index in range(len(subjects))]


def _one_of_each_word(indices: Sequence[int], cases: Sequence[Case], rng: np.random.Generator) -> list[int]:
    kept: dict[str, int] = {}
    for index in rng.permutation(indices).tolist():
        kept.setdefault(cases[index].artwork.word, index)
    return list(kept.values())


def _noise(seed: int, edge: int) -> Tensor:
    return torch.randn(4, edge // 8, edge // 8, generator=torch.Generator().manual_seed(seed))
