"""Pairs from annotated photographs and a folder of backgrounds.

``metadata.jsonl`` lies in the photographs' folder and has a line for each subject, such as ::

    {"file": "0a1b.jpg", "word": "dog", "caption": "a dog on a sofa", "box": [0.1, 0.2, 0.8, 0.9], "mask": "m/0a1b.png"}

``file`` and ``word`` are needed; ``caption`` is "a {word}" if missing. The others, and what OpenImages calls them:

========== ============================================================================================
box        ``XMin, YMin, XMax, YMax``, as parts of the width and height
area       the subject's part of the picture; if missing, the box's, or what is found to be the subject
is_group   ``IsGroupOf``: the box is around several
is_inside  ``IsInside``: the picture was taken from inside the thing
mask       ``MaskPath``: a picture that is white where the subject is; if missing, CLIPSeg looks for the word
word       of ``LabelName`` the text in ``class-descriptions-boxable.csv``, in lower case
========== ============================================================================================
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..encoder.preprocessing import fit_mask
from ..imaging.masks import Box, NoSubjectError, blur_mask, bounding_box
from ..imaging.matting import THRESHOLDS, MattingError
from ..imaging.segmentation import Segmenter, check_segmentation_folder
from .filters import area_of, aspect_ratio_of, refusal
from .pairs import Pair
from .prepare import SkippedPair
from .prompted_context import subject_in_context

METADATA = "metadata.jsonl"


PICTURES = (".jpg", ".jpeg", ".png", ".webp")


SOFTENING = 0.02  # of a mask, in longer edges: its own edge is only nearly right


BOX_MARGIN = 0.02  # of the picture, around a box: what is further away is not the subject


BACKGROUNDS_TRIED = 10


class Photographs:
    """A source for :func:`~.prepare.prepare`: one pair for each line of ``metadata.jsonl``."""

    def __init__(
        self,
        folder: str | Path,
        backgrounds: str | Path,
        segmentation: str | Path | None = None,
        short_edge: int = 512,
        thresholds: tuple[float, float] = THRESHOLDS,
    ) -> None:
        """Look through the folders; no picture is opened yet.

        Args:
            folder: the photographs, with ``metadata.jsonl``.
            backgrounds: a folder of pictures, also in folders inside it.
            segmentation: a CLIPSeg checkpoint folder, for lines without a mask.
            short_edge: larger photographs are scaled down to it, in pixels.
            thresholds: up to the first probability is background, from the second on subject.

        Raises:
            ValueError: one of the folders is not what it should be.
        """
        self.folder, self.backgrounds_folder = Path(folder), Path(backgrounds)
        self.segmentation = segmentation
        self.short_edge, self.thresholds = short_edge, thresholds
        if not (self.folder / METADATA).is_file():
            raise ValueError(f"{self.folder} has no {METADATA}, which says what is in its pictures: write one.")
        self.lines = [line for line in (self.folder / METADATA).read_bytes().splitlines() if line.strip()]
        self.backgrounds = sorted(
            file for file in self.backgrounds_folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file()
        )
        if not self.backgrounds:
            raise ValueError(f"{self.backgrounds_folder} holds no picture to be a background: choose another folder.")
        if segmentation is not None:
            check_segmentation_folder(segmentation)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def settings(self) -> dict[str, object]:
        """What the pairs depend on, apart from the pixels; for the index."""
        names = "\n".join(str(file.relative_to(self.backgrounds_folder)) for file in self.backgrounds)
        return {
            "kind": "photographs",
            "metadata": hashlib.sha256(b"\n".join(self.lines)).hexdigest()[:16],
            "backgrounds": hashlib.sha256(names.encode()).hexdigest()[:16],
            "segmentation": None if self.segmentation is None else Path(self.segmentation).name,
            "short_edge": self.short_edge,
            "thresholds": self.thresholds,
        }

    @cached_property
    def segmenter(self) -> Segmenter:
        """CLIPSeg, read by each process when it is first needed."""
        return Segmenter(self.segmentation)

    def pair(self, index: int, seed: int) -> Pair:
        """See :class:`~.prepare.PairSource`."""
        line = parse_line(self.lines[index])
        _refuse(line, refusal(line.word, line.is_group, line.is_inside))
        photograph = _opened(self.folder / line.file, "RGB", "photograph", self.short_edge)  # [H, W, 3]
        height, width = photograph.shape[:2]
        if line.box is not None:
            area = area_of(line.box) if line.area is None else line.area
            _refuse(line, refusal(line.word, aspect_ratio=aspect_ratio_of(line.box, width, height), area=area))

        order = random.Random(f"{seed} {index}")
        probability = _inside(line.box, self._probability(line, photograph))
        try:
            background = self._background(order)
            subject, _, alpha = subject_in_context(photograph, probability, background, order, self.thresholds)
        except NoSubjectError as error:
            raise SkippedPair("no subject found", f"{line.file}: {error}") from error
        except MattingError as error:
            raise SkippedPair("not to be cut out", f"{line.file}: {error}") from error
        if line.box is None:
            area = alpha.mean().item() if line.area is None else line.area
            _refuse(
                line, refusal(line.word, aspect_ratio=aspect_ratio_of(bounding_box(alpha), width, height), area=area)
            )
        extra = {"file": line.file}
        return Pair(f"{index:08d}", _picture(subject), _picture(photograph), line.word, line.caption, extra)

    def _probability(self, line: Line, photograph: Tensor) -> Tensor:
        """Where the subject is, by its mask or by CLIPSeg; [H, W]."""
        if line.mask:
            mask = _opened(self.folder / line.mask, "L", "mask")[..., 0]
            try:
                mask = fit_mask(mask, photograph[None])[0]
            except ValueError as error:
                raise SkippedPair("mask of another shape", f"{line.mask}: {error}") from error
            return blur_mask(mask, SOFTENING * max(mask.shape))
        if self.segmentation is None:
            raise SkippedPair("no mask", f"{line.file}: give a folder with CLIPSeg, or a mask")
        return self.segmenter(photograph[None], line.word)[0]

    def _background(self, order: random.Random) -> Tensor:
        """A random background that can be read."""
        for _ in range(BACKGROUNDS_TRIED):
            try:
                return _opened(order.choice(self.backgrounds), "RGB", "background")
            except SkippedPair as skip:
                last = skip
        raise last


@dataclass(frozen=True)
class Line:
    """One line of ``metadata.jsonl``, as the module's text describes it."""

    file: str
    word: str
    caption: str
    box: Box | None = None
    area: float | None = None
    is_group: bool = False
    is_inside: bool = False
    mask: str | None = None


def parse_line(text: bytes) -> Line:
    """A line of ``metadata.jsonl``; names that are not ours are left out.

    Raises:
        SkippedPair: it cannot be understood.
    """
    try:
        content = json.loads(text)
        file, word = content["file"], content["word"].strip()
        if not file or not word:
            raise ValueError("file or word is empty")
        if not all(isinstance(content.get(name) or "", str) for name in ("file", "caption", "mask")):
            raise ValueError("file, caption or mask is no text")
        box, area = content.get("box"), content.get("area")
        return Line(
            file,
            word,
            content.get("caption") or f"a {word}",
            None if box is None else _checked_box(*map(float, box)),
            None if area is None else float(area),
            bool(content.get("is_group")),
            bool(content.get("is_inside")),
            content.get("mask"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SkippedPair("bad line", f"{type(error).__name__}: {error} in {text[:200]!r}") from error


def _checked_box(left: float, top: float, right: float, bottom: float) -> Box:
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"the box {[left, top, right, bottom]} is not left, top, right, bottom in 0..1")
    return left, top, right, bottom


def _refuse(line: Line, reason: str | None) -> None:
    if reason:
        raise SkippedPair(reason, f"{line.file}: {line.word}")


def _inside(box: Box | None, probability: Tensor) -> Tensor:
    """[H, W], nothing outside the box: there may be others of its kind."""
    if box is None:
        return probability
    height, width = probability.shape
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = box
    is_inside = (rows > (top - BOX_MARGIN) * height) & (rows < (bottom + BOX_MARGIN) * height)
    is_inside = is_inside & (columns > (left - BOX_MARGIN) * width) & (columns < (right + BOX_MARGIN) * width)
    return torch.where(is_inside, probability, 0.0)


def _opened(path: Path, mode: str, role: str, short_edge: int | None = None) -> Tensor:
    """A picture upright, [H, W, 3 or 1] in 0..1, scaled down to a short edge.

    Raises:
        SkippedPair: it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert(mode)
    except Exception as error:  # there is no list of what a damaged picture can raise
        raise SkippedPair(f"unreadable {role}", f"{path}: {error}") from error
    if short_edge is not None and min(picture.size) > short_edge:
        scale = short_edge / min(picture.size)
        picture = picture.resize([round(edge * scale) for edge in picture.size], Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels.reshape(picture.height, picture.width, -1)


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
