"""The judges of the small world: two small networks that never saw the model they judge.

One recognises a subject in another scene, the other tells backgrounds apart. Both learn from scenes of the training
split alone, rendered on the spot, blurred and noisy at times as a generated image may be. How good they are is measured
on real held-out scenes, and stands in every report beside what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from blip_qformer.atomic import atomic_file
from blip_qformer.data.collate import to_pixels
from blip_qformer.training.losses import contrastive_loss

from ..world.artwork import Artwork
from ..world.backgrounds import BACKGROUNDS
from ..world.scenes import Appearance, cut_out, paste_subject, render_background, sample_appearance, sample_box
from ..world.source import readable_artwork

EDGE = 64  # pixels, of the judges' input
WIDTHS = (32, 64, 96, 128)
EMBEDDING_WIDTH = 64
TEMPERATURE = 0.07
BLURRED_SHARE = 0.5  # of the training images


def _network(outputs: int) -> nn.Sequential:
    """Make a network [B, 3, 64, 64] -> [B, outputs]: four convolutions that halve the image, and a linear layer."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * 16, outputs))  # 4 x 4 positions


class Judges(nn.Module):
    """Say which subject an image shows, and in front of which background."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = _network(EMBEDDING_WIDTH)
        self.background = _network(len(BACKGROUNDS))

    def embed(self, images: Tensor) -> Tensor:
        """Embed the subjects of images; images of one subject lie close together.

        Args:
            images: Images of shape [B, 3, H, W] in 0..1.

        Returns:
            Embeddings of shape [B, 64] and unit length.
        """
        return F.normalize(self.identity(_preprocess(images)), dim=-1)

    def name_backgrounds(self, images: Tensor) -> list[str]:
        """Name the background of each image.

        Args:
            images: Images of shape [B, 3, H, W] in 0..1.

        Returns:
            The backgrounds' names.
        """
        return [BACKGROUNDS[index].name for index in self.classify_backgrounds(images).argmax(dim=-1).tolist()]

    def classify_backgrounds(self, images: Tensor) -> Tensor:
        """Compute the logits of all backgrounds.

        Args:
            images: Images of shape [B, 3, H, W] in 0..1.

        Returns:
            Logits of shape [B, 8], in the order of the backgrounds.
        """
        return self.background(_preprocess(images))


def _preprocess(images: Tensor) -> Tensor:
    """Resize images to the judges' input, in -1..1."""
    return F.interpolate(images, (EDGE, EDGE), mode="area") * 2 - 1


@dataclass(frozen=True)
class JudgesTraining:
    """How the judges are trained.

    Args:
        steps: Number of steps.
        batch_size: Number of subjects in a batch, each in two scenes.
        learning_rate: Highest learning rate of the one-cycle schedule.
        seed: Seed of the weights and of the scenes.
    """

    steps: int = 500
    batch_size: int = 48
    learning_rate: float = 2e-3
    seed: int = 7


def train_judges(artwork: Path, settings: JudgesTraining, progress: Callable[[str], None] = print) -> Judges:
    """Train both judges on the training split.

    Args:
        artwork: An artwork folder.
        settings: How they are trained.
        progress: Function called with a line about the losses every 100 steps and at the end.

    Returns:
        The judges, frozen.

    Raises:
        ValueError: The training split is empty.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    judges = Judges()
    optimizer = torch.optim.AdamW(judges.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    pieces = readable_artwork(artwork, "train")
    for step in range(1, settings.steps + 1):
        images, backgrounds = _sample_batch(pieces, settings.batch_size, rng)  # [2, B, 3, 64, 64], [2, B]
        first, second = (judges.embed(each) for each in images)
        similarity = first @ second.T
        identity_loss = contrastive_loss(similarity, similarity.T, 0, torch.tensor(TEMPERATURE))
        logits = judges.classify_backgrounds(images.flatten(0, 1))
        background_loss = F.cross_entropy(logits, backgrounds.flatten())
        optimizer.zero_grad()
        (identity_loss + background_loss).backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == settings.steps:
            losses = f"identity {float(identity_loss.detach()):.3f}, background {float(background_loss.detach()):.3f}"
            progress(f"judges, step {step}: {losses}")
    return judges.eval().requires_grad_(False)


def save_judges(judges: Judges, file: Path) -> None:
    """Write both networks to one .safetensors file in half precision, whole or not at all.

    Args:
        judges: The judges.
        file: The file to write.

    Raises:
        OSError: The file cannot be written.
    """
    with atomic_file(file) as temporary:
        temporary.write_bytes(save({name: weight.half() for name, weight in judges.state_dict().items()}))


def load_judges(file: Path) -> Judges:
    """Read what :func:`save_judges` wrote.

    Args:
        file: The file to read.

    Returns:
        The judges, frozen.

    Raises:
        ValueError: The file does not hold the judges, or is incomplete.
    """
    judges = Judges()
    try:
        judges.load_state_dict({name: weight.float() for name, weight in load_file(str(file)).items()})
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{file} does not hold these judges: remove it, leave --judges out, and they are trained anew."
        ) from error
    return judges.eval().requires_grad_(False)


def _sample_batch(pieces: Sequence[Artwork], count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Render two scenes of each of ``count`` subjects; half of the subjects are the other half in other colours.

    Returns:
        Images of shape [2, count, 3, 64, 64] in 0..1, and the indices of their backgrounds of shape [2, count].
    """
    chosen = [pieces[int(rng.integers(len(pieces)))] for _ in range(count // 2)]
    subjects = [(artwork, sample_appearance(rng)) for artwork in [*chosen, *chosen]]
    images, backgrounds = [], []
    for _ in range(2):
        scenes = [_sample_scene(artwork, appearance, rng) for artwork, appearance in subjects]
        images.append(torch.stack([to_pixels(image) for image, _ in scenes]))
        backgrounds.append(torch.tensor([index for _, index in scenes]))
    return torch.stack(images), torch.stack(backgrounds)


def _sample_scene(artwork: Artwork, appearance: Appearance, rng: np.random.Generator) -> tuple[Image.Image, int]:
    """Render a subject somewhere, at times blurred; returns the image and the index of its background."""
    index = int(rng.integers(len(BACKGROUNDS)))
    box = sample_box(rng)
    canvas = render_background(BACKGROUNDS[index], EDGE, rng)
    image = paste_subject(cut_out(artwork, appearance, round(box.size * EDGE)), canvas, box)
    if rng.random() < BLURRED_SHARE:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.5))))
    return image, index
