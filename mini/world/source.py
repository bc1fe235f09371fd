"""The world as a source of training pairs: the same subject in one place and in another."""

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
from .places import Place, Random
from .scenes import (
    CAPTION,
    Placement,
    compose,
    in_look,
    mixed,
    paint_place,
    random_place,
    random_placement,
    trimmed,
    varied_look,
)

#: How many things are the upper half of one and the lower half of another, under the name of the first.
MIXED = 0.3


#: Where every target shows its subject. If it stood now here, now there, neither caption nor vectors would say where
#: its outline runs, and a model would learn to take that from the noise.
IN_PLACE = Placement(size=0.72, x=0.5, y=0.54)


#: And where, and on what, if it is alone.
ALONE = Placement(size=0.9, x=0.5, y=0.5)


GREY = (128, 128, 128)


SUBJECT_EDGE = 128  # pixels; what the subject encoder sees is smaller still


log = logging.getLogger("blip_diffusion")


@dataclass(frozen=True)
class World:
    """Pairs of scenes, ``count`` of them; each a function of the seed and its index.

    There are only thousands of drawings, so they are also stretched, sheared and mixed: a model that could learn them
    by heart would never look at the picture.

    Args:
        artwork: an artwork folder, see :mod:`.artwork`.
        split: ``train`` or ``held-out``.
        edge: of the target picture, in pixels.
        alone: whether the target is the subject alone, on grey and always as large.
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
        """What the pairs depend on, apart from the pixels; for the index."""
        drawings = "\n".join(f"{each.code} {each.style} {each.word}" for each in read_artwork(self.artwork))
        return {
            "kind": "artwork",
            "artwork": hashlib.sha256(drawings.encode()).hexdigest()[:16],
            "split": self.split,
            "edge": self.edge,
            "alone": self.alone,
            "stands": asdict(self._stands),
        }

    def pair(self, index: int, seed: int) -> Pair:
        """One subject, with one look, in two places; the caption tells the target's place.

        The input shows it somewhere, the target always at the same spot.

        Raises:
            SkippedPairError: the artwork's file is no picture, or part of one.
        """
        random = np.random.default_rng((seed, index))
        choices = artwork_of_split(self.artwork, self.split)
        artwork, other_half = (choices[random.integers(len(choices))] for _ in range(2))
        is_mixed = random.random() < MIXED
        look = varied_look(random)
        place = random_place(random)
        phrase = place.phrases[random.integers(len(place.phrases))]
        other = paint_place(random_place(random, other_than=place), SUBJECT_EDGE, random)
        here, there = self._stands, random_placement(random)
        try:
            drawing = mixed(artwork, other_half) if is_mixed else trimmed(artwork.file)
            small = in_look(drawing, look, round(there.size * SUBJECT_EDGE))
            large = in_look(drawing, look, round(here.size * self.edge))
        except OSError as error:
            raise SkippedPairError("unreadable artwork", str(error)) from error
        return Pair(
            key=f"{index:08d}",
            subject=compose(small, other, there),
            target=compose(large, self._background(place, random), here),
            word=artwork.word,
            caption=f"a {artwork.word}" if self.alone else CAPTION.format(word=artwork.word, phrase=phrase),
            extra={"code": artwork.code, "style": artwork.style, "place": place.name},
        )

    @property
    def _stands(self) -> Placement:
        return ALONE if self.alone else IN_PLACE

    def _background(self, place: Place, random: Random) -> Image.Image:
        if self.alone:
            return Image.new("RGB", (self.edge, self.edge), GREY)
        return paint_place(place, self.edge, random)


@cache
def artwork_of_split(folder: Path, split: str) -> list[Artwork]:
    """The artwork of one split.

    Raises:
        ValueError: there is no such split, or nothing in it.
    """
    if split not in SPLITS:
        raise ValueError(f'"{split}" is no split of the world: choose one of {", ".join(SPLITS)}.')
    chosen = SPLITS[split](read_artwork(folder))
    if not chosen:
        raise ValueError(f'"{folder}" has no artwork in the split "{split}": fill it anew with python -m mini artwork.')
    return chosen


@cache
def readable_artwork(folder: Path, split: str) -> list[Artwork]:
    """The artwork of one split that can be read; each file that cannot is named in the log.

    Raises:
        ValueError: there is no such split, or nothing in it.
    """
    return [artwork for artwork in artwork_of_split(folder, split) if _is_readable(artwork)]


def _is_readable(artwork: Artwork) -> bool:
    try:
        trimmed(artwork.file)
    except OSError as error:
        log.warning("Artwork is left out that cannot be read: %s.", error)
        return False
    return True
