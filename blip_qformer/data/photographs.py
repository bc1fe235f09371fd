"""Pairs from annotated photographs and a folder of backgrounds.

``metadata.jsonl`` lies in the photographs' folder and has a line for each subject, such as ::

    {"file": "0a1b.jpg", "word": "dog", "caption": "a dog on a sofa", "box": [0.1, 0.2, 0.8, 0.9], "mask": "m/0a1b.png"}

``file`` and ``word`` are needed; ``caption`` is "a {word}" if missing. The others, and what OpenImages calls them:

========== ============================================================================================
box        ``XMin, YMin, XMax, YMax``, in fractions of the width and height
area       the subject's fraction of the photograph; if missing, the fraction of the box or of the cut-out subject
is_group   ``IsGroupOf``: the box is around several objects
is_inside  ``IsInside``: the photograph was taken from inside the object
mask       ``MaskPath``: an image that is white where the subject is; if missing, CLIPSeg segments the word
word       the text of ``LabelName`` in ``class-descriptions-boxable.csv``, in lower case
========== ============================================================================================
"""

from __future__ import annotations

import hashlib
import json
import random
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..encoder.preprocessing import fit_mask
from ..imaging.image_files import UnreadableImageError, open_upright
from ..imaging.masks import Box, NoSubjectError, blur_mask, bounding_box
from ..imaging.matting import THRESHOLDS, MattingError
from ..imaging.pil import to_pil_image
from ..imaging.segmentation import Segmenter, check_segmentation_folder
from ..limits import MAX_LINE_BYTES
from .filters import area_of, aspect_ratio_of, refusal
from .pairs import Pair
from .prepare import SkippedPairError
from .prompted_context import subject_in_context

METADATA = "metadata.jsonl"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASK_SOFTENING = 0.02  # in longer edges: a mask's own edge is only nearly right
BOX_MARGIN = 0.02  # around a box, in fractions of the image; what is further away is not the subject
BACKGROUND_TRIES = 10


class Photographs:
    """A source for :func:`~.prepare.prepare`: one pair for each line of ``metadata.jsonl``.

    No image is opened before its pair is made.

    Args:
        folder: Folder of the photographs, with ``metadata.jsonl``.
        backgrounds: Folder of the backgrounds; folders inside it are searched too.
        segmentation: Folder of a CLIPSeg checkpoint, for lines without a mask.
        short_edge: Length in pixels to which the short edge of larger photographs is scaled down.
        thresholds: Probability up to which a pixel is background, and from which on it is subject.

    Raises:
        ValueError: One of the folders is not what it should be.
    """

    def __init__(
        self,
        folder: str | Path,
        backgrounds: str | Path,
        segmentation: str | Path | None = None,
        short_edge: int = 512,
        thresholds: tuple[float, float] = THRESHOLDS,
    ) -> None:
        self.folder, self.backgrounds_folder = Path(folder), Path(backgrounds)
        self.segmentation = segmentation
        self.short_edge, self.thresholds = short_edge, thresholds
        if not (self.folder / METADATA).is_file():
            raise ValueError(f"{self.folder} has no {METADATA}, which says what is in its pictures: write one.")
        self.lines = [line for line in (self.folder / METADATA).read_bytes().splitlines() if line.strip()]
        self.backgrounds = sorted(
            file
            for file in self.backgrounds_folder.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        )
        if not self.backgrounds:
            raise ValueError(f"{self.backgrounds_folder} holds no picture to be a background: choose another folder.")
        if segmentation is not None:
            check_segmentation_folder(segmentation)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def settings(self) -> dict[str, object]:
        """What the pairs depend on, apart from the images' content; for the index."""
        names = "\n".join(str(file.relative_to(self.backgrounds_folder)) for file in self.backgrounds)
        return {
            "kind": "photographs",
            "metadata": hashlib.sha256(b"\n".join(self.lines)).hexdigest()[:16],
            "backgrounds": hashlib.sha256(names.encode()).hexdigest()[:16],
            "segmentation": None if self.segmentation is None else Path(self.segmentation).name,
            "short_edge": self.short_edge,
            "thresholds": self.thresholds,
        }

    def pair(self, index: int, seed: int) -> Pair:
        """Make one pair, see :meth:`.prepare.PairSource.pair`."""
        annotation = parse_annotation(self.lines[index])
        file, word = annotation.file, annotation.word
        _raise_if_refused(annotation, refusal(word, annotation.is_group, annotation.is_inside))
        photograph = _open_image(self.folder / file, "RGB", "photograph", self.short_edge)  # [H, W, 3]
        height, width = photograph.shape[:2]
        if annotation.box is not None:
            aspect_ratio = aspect_ratio_of(annotation.box, width, height)
            area = area_of(annotation.box) if annotation.area is None else annotation.area
            _raise_if_refused(annotation, refusal(word, aspect_ratio=aspect_ratio, area=area))

        rng = random.Random(f"{seed} {index}")
        probability = _limit_to_box(self._segment(annotation, photograph), annotation.box)  # [H, W]
        try:
            background = self._choose_background(rng)
            subject, _, alpha = subject_in_context(photograph, probability, background, rng, self.thresholds)
        except NoSubjectError as error:
            raise SkippedPairError("no subject found", f"{file}: {error}") from error
        except MattingError as error:
            raise SkippedPairError("not to be cut out", f"{file}: {error}") from error
        if annotation.box is None:
            aspect_ratio = aspect_ratio_of(bounding_box(alpha), width, height)
            area = alpha.mean().item() if annotation.area is None else annotation.area
            _raise_if_refused(annotation, refusal(word, aspect_ratio=aspect_ratio, area=area))
        subject_image, target = to_pil_image(subject), to_pil_image(photograph)
        return Pair(f"{index:08d}", subject_image, target, word, annotation.caption, {"file": file})

    @cached_property
    def _segmenter(self) -> Segmenter | None:
        """CLIPSeg if it was given, loaded by each process when it is first needed."""
        return None if self.segmentation is None else Segmenter(self.segmentation)

    def _segment(self, annotation: Annotation, photograph: Tensor) -> Tensor:
        """Compute the subject's probability [H, W] from its mask or by CLIPSeg."""
        if annotation.mask:
            mask = _open_image(self.folder / annotation.mask, "L", "mask")[..., 0]  # [h, w]
            try:
                mask = fit_mask(mask, photograph[None])[0]  # [H, W]
            except ValueError as error:
                raise SkippedPairError("mask of another shape", f"{annotation.mask}: {error}") from error
            return blur_mask(mask, MASK_SOFTENING * max(mask.shape))
        if self._segmenter is None:
            raise SkippedPairError("no mask", f"{annotation.file}: give a folder with CLIPSeg, or a mask")
        return self._segmenter(photograph[None], annotation.word)[0]

    def _choose_background(self, rng: random.Random) -> Tensor:
        """Open a random background [h, w, 3]; one that cannot be read is replaced by another."""
        for _ in range(BACKGROUND_TRIES - 1):
            with suppress(SkippedPairError):
                return _open_image(rng.choice(self.backgrounds), "RGB", "background")
        return _open_image(rng.choice(self.backgrounds), "RGB", "background")


@dataclass(frozen=True)
class Annotation:
    """One line of ``metadata.jsonl``.

    Args:
        file: Path of the photograph in its folder.
        word: The subject's word.
        caption: The photograph's caption.
        box: The box around the subject.
        area: The subject's fraction of the photograph.
        is_group: Whether the box is around several objects.
        is_inside: Whether the photograph was taken from inside the object.
        mask: Path of the mask in the photographs' folder.
    """

    file: str
    word: str
    caption: str
    box: Box | None = None
    area: float | None = None
    is_group: bool = False
    is_inside: bool = False
    mask: str | None = None


def parse_annotation(line: bytes) -> Annotation:
    """Parse a line of ``metadata.jsonl``; unknown names are ignored.

    Args:
        line: The line, JSON in UTF-8.

    Returns:
        The annotation.

    Raises:
        SkippedPairError: The line cannot be understood.
    """
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"it has {len(line)} bytes")
        content = json.loads(line)
        json.dumps(content, ensure_ascii=False).encode()  # raises for half characters, which no file can hold
        file, word = content["file"], content["word"].strip()
        if not file or not word:
            raise ValueError("file or word is empty")
        if not all(isinstance(content.get(name) or "", str) for name in ("file", "caption", "mask")):
            raise ValueError("file, caption or mask is no text")
        if elsewhere := [name for name in (file, content.get("mask") or "") if leaves_folder(name)]:
            raise ValueError(f"{elsewhere[0]!r} does not lie in the photographs' folder")
        box, area = content.get("box"), content.get("area")
        return Annotation(
            file,
            word,
            content.get("caption") or f"a {word}",
            None if box is None else _checked_box(*map(float, box)),
            None if area is None else _checked_area(float(area)),
            bool(content.get("is_group")),
            bool(content.get("is_inside")),
            content.get("mask"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise SkippedPairError("bad line", f"{type(error).__name__}: {error} in {line[:200]!r}") from error


def leaves_folder(name: str) -> bool:
    """Return whether a path in a line leads out of the photographs' folder, on Linux or on Windows.

    Lines come with photographs from elsewhere: one must not put other images of this machine into the pairs, or have
    Windows log in at a stranger's share.
    """
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.drive or path.root or ".." in path.parts for path in paths) or "\0" in name


def _checked_area(area: float) -> float:
    if not 0 <= area <= 1:
        raise ValueError(f"the area {area} is no fraction from 0 to 1")
    return area


def _checked_box(left: float, top: float, right: float, bottom: float) -> Box:
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"the box {[left, top, right, bottom]} is not left, top, right, bottom in 0..1")
    return left, top, right, bottom


def _raise_if_refused(annotation: Annotation, reason: str | None) -> None:
    if reason:
        raise SkippedPairError(reason, f"{annotation.file}: {annotation.word}")


def _limit_to_box(probability: Tensor, box: Box | None) -> Tensor:
    """Set a probability [H, W] to 0 outside a box, where other objects of the same class may be."""
    if box is None:
        return probability
    height, width = probability.shape
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5  # pixels' middles: [H, 1], [W]
    left, top, right, bottom = box
    within_box = (rows > (top - BOX_MARGIN) * height) & (rows < (bottom + BOX_MARGIN) * height)
    within_box = within_box & (columns > (left - BOX_MARGIN) * width) & (columns < (right + BOX_MARGIN) * width)
    return torch.where(within_box, probability, 0.0)


def _open_image(path: Path, mode: str, role: str, short_edge: int | None = None) -> Tensor:
    """Open an image upright as [H, W, 3 or 1] in 0..1, scaled down to a short edge.

    Raises:
        SkippedPairError: The file cannot be read as an image.
    """
    try:
        image = open_upright(path, mode)
    except UnreadableImageError as error:
        raise SkippedPairError(f"unreadable {role}", str(error)) from error
    if short_edge is not None and min(image.size) > short_edge:
        scale = short_edge / min(image.size)
        width, height = (round(edge * scale) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.reshape(image.height, image.width, -1)
