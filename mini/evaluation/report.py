"""The small model's report: held-out things only, three questions, three baselines (``python -m mini evaluate report``).

Identity: does a generated picture pick its reference out of twenty candidates? Context: is it where the prompt says?
Blending: does the likeness move steadily from one subject to the other? The baselines answer the same questions with
the same model: without a subject, with another thing's subject, and with the reference pasted into a picture that was
drawn without a subject; where two are blended, with one faded into the other.
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
from ..world.places import PLACES, Place, Random
from ..world.scenes import Look, picture_of, random_look, random_place, random_placement
from ..world.source import readable_artwork
from .judges import Judges

CANDIDATES = 20


BLEND_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


PASTED_SIZE = 0.6  # of the picture's edge


BATCH = 8


GENERATED = "with its subject"


WITHOUT = "without a subject"


ANOTHER = "with another thing's subject"


PASTED = "its reference pasted in"


REAL = "real pictures (what the judges are worth)"


@dataclass(frozen=True)
class Settings:
    """How much is drawn.

    Args:
        things: how many held-out subjects; ``places``: in how many places each.
        blends: how many pairs of subjects are blended, each subject in one pair.
        steps, guidance: of DDIM.
        repetitions: how often a prompt is said, as Subject Prompt Compose does.
        edge: of the pictures, in pixels.
        candidates: how many references a picture's own is to be picked from.
    """

    things: int = 60
    places: int = 1
    blends: int = 30
    steps: int = 20
    guidance: float = 4.0
    repetitions: int = 4
    edge: int = 256
    candidates: int = CANDIDATES
    seed: int = 11


@dataclass(frozen=True, eq=False)
class Case:
    """One picture to be drawn: a subject, its reference, and the place that is asked for."""

    artwork: Artwork
    look: Look
    reference: Image.Image
    shown_in: Place
    place: Place
    noise_seed: int


@dataclass
class Report:
    """What was measured: for each way of drawing the share of right identities, right places and steady blends."""

    identity: dict[str, Share] = field(default_factory=dict)
    context: dict[str, Share] = field(default_factory=dict)
    blending: dict[str, Share] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)

    def table(self) -> str:
        """As Markdown; every share with its 95 % interval."""
        chances = f"identity, 1 of {self.settings.candidates} | context, 1 of {len(PLACES)}"
        lines = [f"| drawn | {chances} | blending, steady |", "|---|---|---|---|"]
        for name in self.identity:
            lines.append(f"| {name} | {self.identity[name]} | {self.context[name]} | {self.blending[name]} |")
        return "\n".join(lines)


def make_cases(artwork: Path, settings: Settings) -> list[Case]:
    """The held-out subjects and where they are asked for; a function of the seed.

    Raises:
        ValueError: there are too few things to pick one of so many candidates.
    """
    random = np.random.default_rng(settings.seed)
    cases = []
    for number, (drawing, look) in enumerate(held_out_subjects(artwork, random, settings.things)):
        shown_in = random_place(random)
        reference = picture_of(drawing, look, shown_in, random_placement(random), settings.edge, 1000 + number)
        others = [place for place in PLACES if place is not shown_in]
        for which in random.permutation(len(others))[: settings.places]:
            cases.append(Case(drawing, look, reference, shown_in, others[which], noise_seed=len(cases)))
    things = len({case.artwork.word for case in cases})
    if things < settings.candidates:
        raise ValueError(f"{things} things are too few to pick one of {settings.candidates}: draw more things.")
    return cases


def held_out_subjects(artwork: Path, random: Random, count: int) -> Iterator[tuple[Artwork, Look]]:
    """Things that were never trained on, each with another word: one of its drawings, and how it looks.

    ``random`` is drawn from as they come, so that whoever draws more of it between two of them gets others.
    """
    drawings = readable_artwork(artwork, "held-out")
    words = sorted({each.word for each in drawings})
    for index in random.permutation(len(words))[:count]:
        same_word = [each for each in drawings if each.word == words[index]]
        yield same_word[random.integers(len(same_word))], random_look(random)


def evaluate(
    pipeline: Pipeline,
    judges: Judges,
    artwork: Path,
    settings: Settings,
    progress: Callable[[str], None] = print,
) -> tuple[Report, Image.Image]:
    """Draw everything and judge it.

    Returns:
        The report, and a contact sheet: reference, without a subject, with its subject.

    Raises:
        ValueError: there are too few things, or the model draws what is no picture.
    """
    cases = make_cases(artwork, settings)
    subjects = encode_references(pipeline, cases)
    drawn = {}
    for name, vectors in (
        (GENERATED, subjects),
        (WITHOUT, [None] * len(cases)),
        (ANOTHER, _turned(subjects, settings.places)),
    ):
        progress(f"drawing {len(cases)} pictures {name}")
        drawn[name] = draw_cases(pipeline, cases, vectors, settings)
    drawn[PASTED] = [
        paste_reference(picture, case.reference) for picture, case in zip(drawn[WITHOUT], cases, strict=True)
    ]
    random = np.random.default_rng(settings.seed + 1)
    drawn[REAL] = [
        to_pixels(picture_of(c.artwork, c.look, c.place, random_placement(random), settings.edge, 5000 + c.noise_seed))
        for c in cases
    ]
    report = Report(settings=settings)
    for name, pictures in drawn.items():
        report.identity[name] = identity_share(judges, pictures, cases, settings.seed, settings.candidates)
        report.context[name] = context_share(judges, pictures, cases)

    pairs = blended_pairs(cases, settings)
    progress(f"blending {len(pairs)} pairs")
    faded = [fade(cases[first].reference, cases[second].reference) for first, second in pairs]
    without = [drawn[WITHOUT][first] for first, _ in pairs]
    blends = {
        GENERATED: draw_blends(pipeline, cases, pairs, subjects, settings),
        WITHOUT: [[picture] * len(BLEND_SHARES) for picture in without],
        ANOTHER: draw_blends(pipeline, cases, pairs, _turned(subjects, 2 * settings.places), settings),
        PASTED: [
            [paste_reference(picture, reference) for reference in references]
            for picture, references in zip(without, faded, strict=True)
        ],
        REAL: [[to_pixels(reference) for reference in references] for references in faded],
    }
    report.blending = {name: blending_share(judges, pictures, cases, pairs) for name, pictures in blends.items()}
    return report, contact_sheet(cases, drawn[WITHOUT], drawn[GENERATED])


@torch.no_grad()
def encode_references(pipeline: Pipeline, cases: Sequence[Case]) -> list[Tensor]:
    """The sixteen vectors of each case's reference."""
    size = pipeline.encoder.config.vision.image_size
    vectors = []
    for case in cases:
        picture = to_pixels(case.reference).permute(1, 2, 0)[None]  # [1, H, W, 3]
        vectors.append(pipeline.encoder(preprocess(picture, size=size), [case.artwork.word])[0])
    return vectors


def draw_cases(
    pipeline: Pipeline, cases: Sequence[Case], subjects: Sequence[Tensor | None], settings: Settings
) -> list[Tensor]:
    """A picture [3, H, W] of each case; the same noise for the same case, whatever the subject."""
    pictures: list[Tensor] = []
    for start in range(0, len(cases), BATCH):
        some = cases[start : start + BATCH]
        noise = torch.stack([_noise(case.noise_seed, settings.edge) for case in some])
        prompts = [
            compose_prompt(case.place.phrases[0], case.artwork.word, repetitions=settings.repetitions) for case in some
        ]
        pictures += sample_images(
            pipeline,
            prompts,
            subjects[start : start + BATCH],
            noise=noise,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
        ).cpu()
    if any(not picture.isfinite().all() for picture in pictures):
        raise ValueError(
            "The model draws pictures that are not all numbers: train it anew, or take an older checkpoint."
        )
    return pictures


def paste_reference(picture: Tensor, reference: Image.Image) -> Tensor:
    """The reference, background and all, in the middle of a picture [3, H, W]."""
    canvas = to_pil_image(picture)
    size = round(PASTED_SIZE * canvas.width)
    corner = (canvas.width - size) // 2
    canvas.paste(reference.resize((size, size)), (corner, corner))
    return to_pixels(canvas)


def identity_share(
    judges: Judges, pictures: Sequence[Tensor], cases: Sequence[Case], seed: int, candidates: int = CANDIDATES
) -> Share:
    """How often a picture is closer to its own reference than to the other candidates, which have other words."""
    random = np.random.default_rng(seed)
    references = judges.embed(torch.stack([to_pixels(case.reference) for case in cases]))
    embedded = judges.embed(torch.stack(list(pictures)))
    right = 0
    for index, case in enumerate(cases):
        others = [i for i, other in enumerate(cases) if other.artwork.word != case.artwork.word]
        others = _one_of_each_word(others, cases, random)[: candidates - 1]
        right += int(picks_first(references[[index, *others]] @ embedded[index]))
    return Share(right, len(cases))


def picks_first(similarity: Tensor) -> Tensor:
    """Whether of candidates [..., C] the first is the most similar: no tie, and nothing that is no number."""
    return similarity[..., 0] > similarity[..., 1:].amax(dim=-1)


def context_share(judges: Judges, pictures: Sequence[Tensor], cases: Sequence[Case]) -> Share:
    """How often a picture shows the place that the prompt says."""
    named = judges.name_places(torch.stack(list(pictures)))
    return Share(sum(name == case.place.name for name, case in zip(named, cases, strict=True)), len(cases))


def blended_pairs(cases: Sequence[Case], settings: Settings) -> list[tuple[int, int]]:
    """The first case of each of two things, no thing twice."""
    firsts = range(0, len(cases), settings.places)
    return list(zip(firsts[::2], firsts[1::2], strict=False))[: settings.blends]


def draw_blends(
    pipeline: Pipeline,
    cases: Sequence[Case],
    pairs: Sequence[tuple[int, int]],
    subjects: Sequence[Tensor],
    settings: Settings,
) -> list[list[Tensor]]:
    """For each pair a picture at every share of the blend, all from the same noise and in the place of the first."""
    return [
        draw_cases(
            pipeline,
            [cases[first]] * len(BLEND_SHARES),
            [(1 - share) * subjects[first] + share * subjects[second] for share in BLEND_SHARES],
            settings,
        )
        for first, second in pairs
    ]


def fade(first: Image.Image, second: Image.Image) -> list[Image.Image]:
    """A picture that turns into another, pixel by pixel, at every share of a blend."""
    return [Image.blend(first, second, share) for share in BLEND_SHARES]


def blending_share(
    judges: Judges,
    pictures: Sequence[Sequence[Tensor]],
    cases: Sequence[Case],
    pairs: Sequence[tuple[int, int]],
) -> Share:
    """How often likeness moves from the first subject to the second at every step of a blend, never back.

    Likeness to the second minus likeness to the first is compared over the shares 0, 1/4, 1/2, 3/4, 1.
    """
    references = judges.embed(torch.stack([to_pixels(case.reference) for case in cases]))
    steady = 0
    for (first, second), blend in zip(pairs, pictures, strict=True):
        likeness = judges.embed(torch.stack(list(blend))) @ (references[second] - references[first])
        steady += bool((likeness.diff() > 0).all())  # a model that ignores its subjects does not move
    return Share(steady, len(pairs))


def contact_sheet(
    cases: Sequence[Case], without: Sequence[Tensor], drawn: Sequence[Tensor], shown: int = 12
) -> Image.Image:
    """Columns of reference, without a subject, with its subject."""
    edge = 128
    columns = min(shown, len(cases))
    picked = np.linspace(0, len(cases) - 1, columns).round().astype(int)
    sheet = Image.new("RGB", (columns * edge, 3 * edge))
    for column, index in enumerate(picked):
        rows = (cases[index].reference, to_pil_image(without[index]), to_pil_image(drawn[index]))
        for row, picture in enumerate(rows):
            sheet.paste(picture.resize((edge, edge), Image.Resampling.LANCZOS), (column * edge, row * edge))
    return sheet


def _turned(subjects: Sequence[Tensor], by: int) -> list[Tensor]:
    """For each case the subject of one so many further on."""
    return [subjects[(index + by) % len(subjects)] for index in range(len(subjects))]


def _one_of_each_word(indices: Sequence[int], cases: Sequence[Case], random: np.random.Generator) -> list[int]:
    kept: dict[str, int] = {}
    for index in random.permutation(indices).tolist():
        kept.setdefault(cases[index].artwork.word, index)
    return list(kept.values())


def _noise(seed: int, edge: int) -> Tensor:
    return torch.randn(4, edge // 8, edge // 8, generator=torch.Generator().manual_seed(seed))
