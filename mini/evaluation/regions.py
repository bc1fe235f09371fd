"""Several held-out things in one image, each in a region of its own (``python -m mini evaluate regions``).

Identity: does what is in a region pick its own reference out of twenty candidates? Bleeding: does it pick the reference
of another thing in the same image, with its own left out of the twenty? Without bleeding that is chance, one of twenty.

The same noise is sampled with regions in attention, as the node Subject Regions does, and with a prediction for each
prompt, mixed by masks, as ComfyUI does for masked conditionings (``calc_cond_batch`` in ``comfy/samplers.py``). The
small world has one thing in an image, and the model was never shown two: the images here have a square of the world's
size for each thing, side by side, and in its middle the region, as large and as low as things are in the world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from blip_qformer.atomic import atomic_file
from blip_qformer.attention.edits import Box, Region
from blip_qformer.attention.plan import StepPlan
from blip_qformer.attention.regions import RegionAttention, attend_regions, pixel_weights, region_weights
from blip_qformer.data.collate import to_pixels
from blip_qformer.diffusion.ddim import ddim_sample
from blip_qformer.evaluation.intervals import Mean
from blip_qformer.pipeline import Pipeline
from blip_qformer.pipeline.clip_text_model import encode_prompts
from blip_qformer.pipeline.sample import NEGATIVE_PROMPT, tokenize_prompts
from blip_qformer.prompt import compose_prompt
from blip_qformer.training.stages.base import to_pil_image

from ..world.backgrounds import BACKGROUNDS
from ..world.scenes import render_scene, sample_box
from .judges import Judges
from .report import CANDIDATES, TILE, Case, encode_references, held_out_subjects, picks_first

COUNTS = (2, 3)  # of things in an image
REGION = Box(0.12, 0.17, 0.76, 0.76)  # of a square
GAP = 4  # pixels, in the contact sheet

REGIONS = "Subject Regions"
REGIONS_ALONE = "Subject Regions, base_share 0"
MASKS = "stock masks, the scene everywhere"
MASKS_ALONE = "stock masks, the scene around them"
REAL = "real pictures (what the judges are worth)"


@dataclass(frozen=True)
class RegionsSettings:
    """What is sampled, and how.

    Args:
        pictures: Number of images for each number of things, no thing twice.
        steps: Number of DDIM steps.
        guidance_scale: Weight of the prompts.
        repetitions: Number of times that a prompt is repeated, as Subject Prompt Compose does.
        feather: Width of the soft edge of Subject Regions, as a fraction of the image's edge.
        base_share: Share of the scene in each of its regions.
        edge: Edge of the square of each thing, and so the height of the images, in pixels.
        candidates: Number of references that one is picked from.
        seed: Seed of the things, backgrounds and noise.
    """

    pictures: int = 20
    steps: int = 20
    guidance_scale: float = 4.0
    repetitions: int = 4
    feather: float = 0.1
    base_share: float = 0.2
    edge: int = 256
    candidates: int = CANDIDATES
    seed: int = 13


@dataclass(frozen=True)
class Verdict:
    """The judges' verdict on the regions of one image.

    Args:
        identity: Share of regions that pick their own reference.
        bleeding: Share of pairs of a region and another thing of the image in which the region picks that one.
        likeness: Mean likeness of a region to its own reference, the cosine of the judge's embeddings.
        excess: By how much a region is more like the other things of the image than like unrelated ones.
    """

    identity: float
    bleeding: float
    likeness: float
    excess: float


@dataclass
class RegionsReport:
    """Verdicts on every image, by the number of things in it and the way it was made.

    Args:
        settings: What was sampled, and how.
        verdicts: (number of things, way) -> the verdict on each image.
    """

    settings: RegionsSettings
    verdicts: dict[tuple[int, str], list[Verdict]] = field(default_factory=dict)

    def table(self) -> str:
        """Format as Markdown: the means over images, and the differences on the same noise."""
        of = f"1 of {self.settings.candidates}"
        lines = [
            f"| things | drawn | identity in its own region, {of} | another's identity in it, {of} | "
            "likeness to itself | likeness to another, above that to unrelated things |",
            "|---|---|---|---|---|---|",
        ]
        for (count, way), verdicts in self.verdicts.items():
            identity = _percent([verdict.identity for verdict in verdicts])
            bleeding = _percent([verdict.bleeding for verdict in verdicts])
            likeness = _signed([verdict.likeness for verdict in verdicts])
            excess = _signed([verdict.excess for verdict in verdicts])
            lines.append(f"| {count} | {way} | {identity} | {bleeding} | {likeness} | {excess} |")
        lines += ["", "Differences on the same noise, ours minus the stock graph's:", ""]
        lines += [
            "| things | ours | stock | identity | another's identity | likeness to another |",
            "|---|---|---|---|---|---|",
        ]
        for count in COUNTS:
            for ours, stock in ((REGIONS, MASKS), (REGIONS_ALONE, MASKS_ALONE)):
                pairs = list(zip(self.verdicts[count, ours], self.verdicts[count, stock], strict=True))
                identity = _percent([one.identity - other.identity for one, other in pairs], "+")
                bleeding = _percent([one.bleeding - other.bleeding for one, other in pairs], "+")
                excess = _signed([one.excess - other.excess for one, other in pairs])
                lines.append(f"| {count} | {ours} | {stock} | {identity} | {bleeding} | {excess} |")
        return "\n".join(lines)


def evaluate_regions(
    pipeline: Pipeline,
    judges: Judges,
    artwork: Path,
    folder: Path,
    settings: RegionsSettings,
    progress: Callable[[str], None] = print,
) -> tuple[RegionsReport, Image.Image]:
    """Sample all images that a folder does not hold yet, and judge them.

    Args:
        pipeline: The model.
        judges: The judges.
        artwork: An artwork folder.
        folder: Folder of the sampled images; those in it are not sampled again.
        settings: What is sampled, and how.
        progress: Function called with a line before each image that is sampled.

    Returns:
        The report, and a contact sheet: for each image its references, then the image in every way.

    Raises:
        ValueError: There are too few held-out things.
    """
    groups = make_groups(artwork, settings)
    references = judges.embed(torch.stack([to_pixels(case.reference) for group in groups for case in group]))
    report, rows = RegionsReport(settings), []
    first = 0  # of the group's references
    for number, group in enumerate(groups):
        count = len(group)
        own = list(range(first, first + count))
        first += count
        images = {REAL: _real_image(group, settings)}
        for way in (REGIONS, MASKS, REGIONS_ALONE, MASKS_ALONE):
            file = folder / f"{count}-{number:03d}-{way.replace(' ', '-').replace(',', '')}.png"
            if not file.is_file():
                progress(f"drawing {file.stem}, {number + 1} of {len(groups)}")
                with atomic_file(file) as temporary:
                    sample_group(pipeline, group, way, settings).save(temporary, format="PNG")
            images[way] = Image.open(file).convert("RGB")
        for way, image in images.items():
            verdict = judge_regions(judges, references, own, image, settings.candidates, settings.seed + number)
            report.verdicts.setdefault((count, way), []).append(verdict)
        rows.append([*(case.reference for case in group), *images.values()])
    report.verdicts = dict(sorted(report.verdicts.items(), key=lambda entry: entry[0][0]))
    return report, contact_sheet(rows)


def make_groups(artwork: Path, settings: RegionsSettings) -> list[list[Case]]:
    """Choose the things of each image and the background it is asked for; a function of the seed.

    Args:
        artwork: An artwork folder.
        settings: What is sampled, and how.

    Returns:
        The groups, in turns of two and of three things, so that the first ones are the same for any number of images.

    Raises:
        ValueError: There are too few things.
    """
    rng = np.random.default_rng(settings.seed)
    counts = [count for _ in range(settings.pictures) for count in COUNTS]
    things = held_out_subjects(artwork, rng, sum(counts))
    groups: list[list[Case]] = []
    for number, count in enumerate(counts):
        shown, asked = (BACKGROUNDS[index] for index in rng.permutation(len(BACKGROUNDS))[:2])
        group = []
        for _, (piece, appearance) in zip(range(count), things, strict=False):  # takes no thing more than it uses
            reference = render_scene(
                piece, appearance, shown, sample_box(rng), settings.edge, 100 * number + len(group)
            )
            group.append(Case(piece, appearance, reference, shown, asked, noise_seed=number))
        groups.append(group)
    if len(groups[-1]) < counts[-1] or sum(counts) < settings.candidates + max(COUNTS):
        raise ValueError(
            f"There are {sum(map(len, groups))} held-out things for {settings.pictures} pictures of two and of three, "
            f"and one is picked of {settings.candidates}: ask for more or fewer pictures, or fill the artwork folder."
        )
    return groups


@torch.no_grad()
def sample_group(pipeline: Pipeline, group: Sequence[Case], way: str, settings: RegionsSettings) -> Image.Image:
    """Sample an image of some things, each in its region.

    Args:
        pipeline: The model.
        group: The things.
        way: One of the ways above.
        settings: What is sampled, and how.

    Returns:
        The image, RGB.
    """
    scene = group[0].background.phrases[0]
    prompts = [
        ", ".join([scene] * settings.repetitions),
        *(compose_prompt(scene, case.artwork.word, repetitions=settings.repetitions) for case in group),
        NEGATIVE_PROMPT,
    ]
    vectors = [None, *encode_references(pipeline, group), None]
    context = encode_prompts(pipeline.text_encoder, tokenize_prompts(pipeline, prompts), vectors)
    size = settings.edge // 8
    generator = torch.Generator().manual_seed(1000 * settings.seed + group[0].noise_seed)
    noise = torch.randn(1, 4, size, size * len(group), generator=generator)
    denoise = denoise_by_attention if way in (REGIONS, REGIONS_ALONE) else denoise_by_masks
    with denoise(pipeline.unet, context[:-1], prompt_weights(context, way, settings, size)) as denoiser:
        latents = ddim_sample(
            denoiser,
            context[-1:],
            context[:1],
            noise,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
        )
    decoded = pipeline.vae.decode(latents / pipeline.vae.config["scaling_factor"], return_dict=False)[0]
    return to_pil_image((decoded[0].float() / 2 + 0.5).clamp(0, 1))


def prompt_weights(context: Tensor, way: str, settings: RegionsSettings, size: int) -> Tensor:
    """Return the weights of the scene's prompt and of each region's, [prompts, 1, size, W]; they add up to 1.

    Args:
        context: Context of the scene's, the regions' and the negative prompt, of shape [prompts + 1, 77, width].
        way: One of the ways above.
        settings: What is sampled, and how.
        size: Height of the latents.
    """
    is_ours, is_alone = way in (REGIONS, REGIONS_ALONE), way in (REGIONS_ALONE, MASKS_ALONE)
    feather = settings.feather if is_ours else 0.0
    share = settings.base_share if is_ours and not is_alone else 0.0
    count = len(context) - 2
    boxes = [Box((number + REGION.x) / count, REGION.y, REGION.width / count, REGION.height) for number in range(count)]
    regions = [
        Region(each[None], box, feather=feather, base_share=share)
        for each, box in zip(context[1:-1], boxes, strict=True)
    ]
    weights = region_weights(regions, size, size * count)
    if way == MASKS:  # a conditioning without a mask counts everywhere as one with a mask does inside it
        weights[0] = 1
        weights = weights / weights.sum(dim=0)
    return weights


@contextmanager
def denoise_by_attention(unet: Any, context: Tensor, weights: Tensor):
    """Predict noise in one call, in whose cross-attentions each region attends to its own prompt.

    Args:
        unet: The U-Net of diffusers; its attention processors are others inside the block.
        context: Context of the scene's and the regions' prompts, of shape [prompts, 77, width].
        weights: Their weights, of shape [prompts, 1, h, w].

    Yields:
        The denoiser of an unconditional row and a conditional one.
    """
    processors = dict(unet.attn_processors)
    regional = RegionalProcessor(context, weights)
    unet.set_attn_processor(
        {name: regional if ".attn2." in name else processor for name, processor in processors.items()}
    )
    try:
        yield lambda *inputs: unet(*inputs).sample
    finally:
        unet.set_attn_processor(processors)


@contextmanager
def denoise_by_masks(unet: Any, context: Tensor, weights: Tensor):
    """Predict noise for each prompt, and mix the predictions by the masks.

    Args:
        unet: The U-Net of diffusers.
        context: Context of the scene's and the regions' prompts, of shape [prompts, 77, width].
        weights: Their weights, of shape [prompts, 1, h, w].

    Yields:
        The denoiser of an unconditional row and a conditional one.
    """

    def denoise(latents: Tensor, timesteps: Tensor, own_context: Tensor) -> Tensor:
        prompts = torch.cat([own_context[:1], context])
        predicted = unet(latents[:1].expand(len(prompts), -1, -1, -1), timesteps[:1].expand(len(prompts)), prompts)
        uncond, *cond = predicted.sample.split(1)
        return torch.cat([uncond, (torch.cat(cond) * weights).sum(dim=0, keepdim=True)])

    yield denoise


class RegionalProcessor:
    """An attention processor of diffusers: the last row of a call attends to the prompts of regions.

    Args:
        context: Context of the scene's and the regions' prompts, of shape [prompts, 77, width].
        weights: Their weights, of shape [prompts, 1, h, w].
    """

    def __init__(self, context: Tensor, weights: Tensor) -> None:
        self.context, self.weights = context, weights

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """Compute a cross-attention of an unconditional row and a conditional one.

        Args:
            attn: The layer.
            hidden_states: Hidden states of shape [2, pixels, channels].
            encoder_hidden_states: The negative prompt's context and the scene's, of shape [2, 77, width].

        Returns:
            Hidden states of the same shape.
        """

        def attend(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
            query, key, values = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (query, key, values))
            return F.scaled_dot_product_attention(query, key, values).transpose(1, 2).flatten(2)

        query = attn.to_q(hidden_states)
        columns = self.weights.shape[-1] // self.weights.shape[-2]  # an image is as many squares wide
        edge = round((query.shape[1] / columns) ** 0.5)
        attentions = [
            RegionAttention(attn.to_k(each[None]), attn.to_v(each[None]), weights, StepPlan())
            for each, weights in zip(self.context, pixel_weights(self.weights, (edge, edge * columns)), strict=True)
        ]
        uncond = encoder_hidden_states[:1]
        rows = [
            attend(query[:1], attn.to_k(uncond), attn.to_v(uncond)),
            attend_regions(query[1:], attentions, 1, attend),
        ]
        return attn.to_out[1](attn.to_out[0](torch.cat(rows)))


def judge_regions(
    judges: Judges, references: Tensor, own: Sequence[int], image: Image.Image, candidates: int, seed: int
) -> Verdict:
    """Judge what is in the regions of an image.

    Args:
        judges: The judges.
        references: Their embeddings of all things' references, of shape [T, 64].
        own: Indices of the things in the image, in the order of its regions.
        image: The image, with a square region for each thing.
        candidates: Number of references that one is picked from.
        seed: Seed of the choice of candidates.

    Returns:
        The verdict.
    """
    edge = image.height
    crops = [to_pixels(image.crop((left, 0, left + edge, edge))) for left in range(0, image.width, edge)]
    similarity = judges.embed(torch.stack(crops)) @ references.T  # [regions, T]
    unrelated = np.setdiff1d(np.arange(len(references)), own)
    rng = np.random.default_rng(seed)
    right, wrong, excess = [], [], []
    for row, thing in zip(similarity, own, strict=True):
        others = [each for each in own if each != thing]
        drawn = rng.permutation(unrelated).tolist()
        right.append(picks_first(row[[thing, *others, *drawn][:candidates]]))
        wrong += [picks_first(row[[other, *drawn][:candidates]]) for other in others]
        excess.append(float(row[others].mean() - row[drawn].mean()))
    likeness = similarity[range(len(own)), list(own)].mean()
    return Verdict(float(np.mean(right)), float(np.mean(wrong)), float(likeness), float(np.mean(excess)))


def contact_sheet(rows: Sequence[Sequence[Image.Image]], count: int = 8) -> Image.Image:
    """Lay the first images out, a row for each: its references, then the image in every way.

    Args:
        rows: Images of each row.
        count: Highest number of rows.

    Returns:
        The sheet, RGB.
    """
    lines = []
    for images in rows[:count]:
        scaled = [image.resize((TILE * image.width // image.height, TILE)) for image in images]
        line = Image.new("RGB", (sum(image.width + GAP for image in scaled), TILE), "white")
        left = 0
        for image in scaled:
            line.paste(image, (left, 0))
            left += image.width + GAP
        lines.append(line)
    sheet = Image.new("RGB", (max(line.width for line in lines), (TILE + GAP) * len(lines)), "white")
    for row, line in enumerate(lines):
        sheet.paste(line, (0, row * (TILE + GAP)))
    return sheet


def _real_image(group: Sequence[Case], settings: RegionsSettings) -> Image.Image:
    """Render the things of a group side by side, each in a scene of its own."""
    edge, rng = settings.edge, np.random.default_rng(group[0].noise_seed)
    image = Image.new("RGB", (edge * len(group), edge))
    for number, case in enumerate(group):
        seed = 5000 + 10 * case.noise_seed + number
        scene = render_scene(case.artwork, case.appearance, case.background, sample_box(rng), edge, seed)
        image.paste(scene, (number * edge, 0))
    return image


def _percent(values: Sequence[float], sign: str = "") -> str:
    mean = Mean.of(values)
    return f"{mean.value:{sign}.1%} ± {mean.half:.1%}"


def _signed(values: Sequence[float]) -> str:
    mean = Mean.of(values)
    return f"{mean.value:+.3f} ± {mean.half:.3f}"
