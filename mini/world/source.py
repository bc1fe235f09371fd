"""The world as a source of training pairs: one subject in front of two backgrounds."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from blip_qformer.data.pairs import Pair
from blip_qformer.data.prepare import SkippedPairError

from .artwork import SPLITS, Artwork, read_artwork
from .backgrounds import Background
from .scenes import (
    CAPTION,
    SubjectBox,
    apply_appearance,
    join_halves,
    open_artwork,
    paste_subject,
    render_background,
    sample_background,
    sample_box,
    sample_varied_appearance,
)

#: Share of subjects that are the upper half of one thing and the lower half of another, under the first one's name.
JOINED_SHARE = 0.3

#: The box of the subject in every target. If it varied, neither caption nor vectors would tell where the outline is,
#: and a model would learn to read that from the noise.
TARGET_BOX = SubjectBox(size=0.72, x=0.5, y=0.54)

#: The same, and the colour behind it, for targets that show the subject alone.
ALONE_BOX = SubjectBox(size=0.9, x=0.5, y=0.5)
GREY = (128, 128, 128)

SUBJECT_EDGE = 128  # pixels; the subject encoder sees less

log = logging.getLogger("blip_diffusion")


@dataclass(frozen=True)
class World:
    """Pairs of scenes, each a function of the seed and its index.

    The artwork is only thousands of images, so it is also stretched, sheared and joined from halves: a model that could
    memorise it would not need the input image.

    Args:
        artwork: An artwork folder, see :mod:`.artwork`.
        split: ``train`` or ``held-out``.
        count: Number of pairs.
        edge: Edge of the targets, in pixels.
        alone: Whether targets show the subject alone, on grey and always of the same size.
    """

    artwork: Path
    split: str = "train"
    count: int = 10_000
    edge: int = 256
    alone: bool = False

    def __len__(self) -> int:
        return self.count

    @property
    def settings(self) -> dict[str, object]:
        """What the pairs depend on, apart from the artwork's pixels; for the index."""
        listing = "\n".join(f"{each.code} {each.style} {each.word}" for each in read_artwork(self.artwork))
        return {
            "kind": "artwork",
            "artwork": hashlib.sha256(listing.encode()).hexdigest()[:16],
            "split": self.split,
            "edge": self.edge,
            "alone": self.alone,
            "stands": asdict(self._target_box),
        }

    def pair(self, index: int, seed: int) -> Pair:
        """Make one pair: one subject in one appearance in front of two backgrounds.

        The caption names the background of the target image. The subject's box varies in the input, and is the same in
        all targets.

        Args:
            index: The pair's index.
            seed: Seed of all pairs.

        Returns:
            The pair.

        Raises:
            SkippedPairError: The artwork's file is no image, or incomplete.
        """
        rng = np.random.default_rng((seed, index))
        choices = artwork_of_split(self.artwork, self.split)
        artwork, other_half = (choices[rng.integers(len(choices))] for _ in range(2))
        is_joined = rng.random() < JOINED_SHARE
        appearance = sample_varied_appearance(rng)
        background = sample_background(rng)
        phrase = background.phrases[rng.integers(len(background.phrases))]
        input_canvas = render_background(sample_background(rng, other_than=background), SUBJECT_EDGE, rng)
        target_box, input_box = self._target_box, sample_box(rng)
        try:
            image = join_halves(artwork, other_half) if is_joined else open_artwork(artwork.file)
            small = apply_appearance(image, appearance, round(input_box.size * SUBJECT_EDGE))
            large = apply_appearance(image, appearance, round(target_box.size * self.edge))
        except OSError as error:
            raise SkippedPairError("unreadable artwork", str(error)) from error
        return Pair(
            key=f"{index:08d}",
            subject=paste_subject(small, input_canvas, input_box),
            target=paste_subject(large, self._target_canvas(background, rng), target_box),
            word=artwork.word,
            caption=f"a {artwork.word}" if self.alone else CAPTION.format(word=artwork.word, phrase=phrase),
            extra={"code": artwork.code, "style": artwork.style, "place": background.name},
        )

    @property
    def _target_box(self) -> SubjectBox:
        return ALONE_BOX if self.alone else TARGET_BOX

    def _target_canvas(self, background: Background, rng: np.random.Generator) -> Image.Image:
        if self.alone:
            return Image.new("RGB", (self.edge, self.edge), GREY)
        return render_background(background, self.edge, rng)


@cache
def artwork_of_split(folder: Path, split: str) -> list[Artwork]:
    """List the artwork of one split.

    Args:
        folder: An artwork folder.
        split: ``train`` or ``held-out``.

    Returns:
        The artwork, in the folder's order.

    Raises:
        ValueError: There is no such split, or nothing in it.
    """
    if split not in SPLITS:
        raise ValueError(f'"{split}" is no split of the world: choose one of {", ".join(SPLITS)}.')
    chosen = SPLITS[split](read_artwork(folder))
    if not chosen:
        raise ValueError(f'"{folder}" has no artwork in the split "{split}": fill it anew with python -m mini artwork.')
    return chosen


@cache
def readable_artwork(folder: Path, split: str) -> list[Artwork]:
    """List the artwork of one split that can be read; each file that cannot is named in the log.

    Args:
        folder: An artwork folder.
        split: ``train`` or ``held-out``.

    Returns:
        The artwork, in the folder's order.

    Raises:
        ValueError: There is no such split, or nothing in it.
    """
    return [artwork for artwork in artwork_of_split(folder, split) if _is_readable(artwork)]


def _is_readable(artwork: Artwork) -> bool:
    try:
        open_artwork(artwork.file)
    except OSError as error:
        log.warning("Artwork is left out that cannot be read: %s.", error)
        return False
    return True
