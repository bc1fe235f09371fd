"""The judges of the small world: two small networks that never saw the model they judge.

One knows a subject again in another place, the other tells places apart. Both learn from scenes of the training split
alone, painted on the spot, blurred and noisy at times as a generated picture may be; what they are worth is measured on
real held-out scenes and stands in every report beside what they say.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip_qformer.atomic import atomic_file
from blip_qformer.data.collate import to_pixels
from blip_qformer.training.losses import contrastive_loss

from ..world.artwork import Artwork
from ..world.places import PLACES, Random
from ..world.scenes import Look, compose, cut_out, paint_place, random_look, random_placement
from ..world.source import readable_artwork

EDGE = 64  # pixels, of what the judges see


WIDTHS = (32, 64, 96, 128)


EMBEDDING_WIDTH = 64


TEMPERATURE = 0.07


BLURRED = 0.5  # the part of pictures that is blurred


def _network(outputs: int) -> nn.Sequential:
    """[B, 3, 64, 64] -> [B, outputs]: four convolutions that halve the picture, and what is where on a 4 x 4 grid."""
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 16, outputs))


class Judges(nn.Module):
    """Who is it, and where is it?"""

    def __init__(self) -> None:
        super().__init__()
        self.identity = _network(EMBEDDING_WIDTH)
        self.place = _network(len(PLACES))

    def embed(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> [B, 64] of unit length; pictures of one subject lie close together."""
        return F.normalize(self.identity(_seen(pictures)), dim=-1)

    def name_places(self, pictures: Tensor) -> list[str]:
        """[B, 3, H, W] in 0..1 -> the place each one shows."""
        return [PLACES[index].name for index in self.place(_seen(pictures)).argmax(dim=-1).tolist()]


def _seen(pictures: Tensor) -> Tensor:
    """Pictures at the judges' size, around zero."""
    return F.interpolate(pictures, (EDGE, EDGE), mode="area") * 2 - 1


@dataclass(frozen=True)
class JudgesTraining:
    """How the judges are trained; the seed decides all of it."""

    steps: int = 500
    batch_size: int = 48
    learning_rate: float = 2e-3
    seed: int = 7


def train_judges(artwork: Path, settings: JudgesTraining, progress: Callable[[str], None] = print) -> Judges:
    """Train both judges on the training split.

    Args:
        artwork: an artwork folder.
        progress: is told the losses now and then.
    """
    torch.manual_seed(settings.seed)
    random = np.random.default_rng(settings.seed)
    judges = Judges()
    optimizer = torch.optim.AdamW(judges.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    drawings = readable_artwork(artwork, "train")
    for step in range(1, settings.steps + 1):
        pictures, places = _scenes(drawings, settings.batch_size, random)  # [2, B, 3, 64, 64], [2, B]
        here, there = (judges.embed(each) for each in pictures)
        similarity = here @ there.T
        identity = contrastive_loss(similarity, similarity.T, 0, torch.tensor(TEMPERATURE))
        where = F.cross_entropy(judges.place(_seen(pictures.flatten(0, 1))), places.flatten())
        optimizer.zero_grad()
        (identity + where).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == settings.steps:
            progress(f"judges, step {step}: identity {float(identity.detach()):.3f}, place {float(where.detach()):.3f}")
    return judges.eval().requires_grad_(False)


def save_judges(judges: Judges, file: Path) -> None:
    """Write both networks as one .safetensors file, in half precision; all of it or nothing."""
    with atomic_file(file) as temporary:
        save_file({name: weight.half() for name, weight in judges.state_dict().items()}, temporary)


def load_judges(file: Path) -> Judges:
    """Read what :func:`save_judges` wrote.

    Raises:
        ValueError: it is another file, or part of one.
    """
    judges = Judges()
    try:
        judges.load_state_dict({name: weight.float() for name, weight in load_file(str(file)).items()})
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{file} does not hold these judges: remove it, leave --judges out, and they are trained anew."
        ) from error
    return judges.eval().requires_grad_(False)


def _scenes(drawings: Sequence[Artwork], count: int, random: Random) -> tuple[Tensor, Tensor]:
    """Two scenes of each of ``count`` subjects; half of them are the same drawing as another one, in other colours."""
    chosen = [drawings[random.integers(len(drawings))] for _ in range(count // 2)]
    subjects = [(artwork, random_look(random)) for artwork in [*chosen, *chosen]]
    pictures, places = [], []
    for _ in range(2):
        scenes = [_scene(artwork, look, random) for artwork, look in subjects]
        pictures.append(torch.stack([to_pixels(picture) for picture, _ in scenes]))
        places.append(torch.tensor([place for _, place in scenes]))
    return torch.stack(pictures), torch.stack(places)


def _scene(artwork: Artwork, look: Look, random: Random) -> tuple[Image.Image, int]:
    index = int(random.integers(len(PLACES)))
    placement = random_placement(random)
    background = paint_place(PLACES[index], EDGE, random)
    picture = compose(cut_out(artwork, look, round(placement.size * EDGE)), background, placement)
    if random.random() < BLURRED:
        picture = picture.filter(ImageFilter.GaussianBlur(float(random.uniform(0.3, 1.5))))
    return picture, index
