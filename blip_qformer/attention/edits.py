"""The edits that a user asks for, as plain data that travels with a conditioning.

A batch is sampled in groups, a source image and its edited images one behind the other: [source, edited, source,
edited].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompt import TokenSpan
from .alignment import Alignment
from .schedule import StepRange


@dataclass(frozen=True, eq=False)
class Reweight:
    """Attention re-weighting: factors on the attention to some tokens (arXiv 2208.01626, section 4).

    Args:
        factors: The factor of each token, of shape [tokens].
        steps: The steps in which it applies.
        image: Index of the image in its group, 0 being the source; None means all.
    """

    factors: Tensor
    steps: StepRange
    image: int | None = None

    def padded(self, tokens: int) -> Reweight:
        """Return the same edit for a longer prompt.

        Args:
            tokens: Number of tokens of the prompt; the added ones get the factor 1.
        """
        return replace(self, factors=F.pad(self.factors, (0, tokens - len(self.factors)), value=1.0))


@dataclass(frozen=True, eq=False)
class EditedImage:
    """How one image of a group follows its source.

    Args:
        alignment: Which source token's attention goes to which edited token.
        steps: For each token, the steps in which the source's attention is injected.
        source_words: 1 at the tokens of the source's blend words, of shape [tokens]; None if there are none.
        edited_words: The same for the edited prompt's blend words. If both are None, the edit is everywhere.
    """

    alignment: Alignment
    steps: tuple[StepRange, ...]
    source_words: Tensor | None = None
    edited_words: Tensor | None = None

    @property
    def has_local_blend(self) -> bool:
        """Whether the edit is restricted to where blend words attend."""
        return self.source_words is not None or self.edited_words is not None


@dataclass(frozen=True, eq=False)
class PromptToPrompt:
    """Images that follow a source image (arXiv 2208.01626).

    Args:
        images: The edited images of a group, from index 1 on.
        self_steps: The steps in which the source's self-attention is injected.
        threshold: Threshold of local blend, relative to a map's maximum.
        source_unguided: Whether the source is sampled from its conditional prediction alone, as DDIM inversion needs.
        keep_masks: Called at the end of a run with all latents, of shape [B, C, H, W], and the masks of local blend, of
            shape [B', H, W], one for each edited image of each group.
        blend_regions: Whether the edit is restricted to the regions of its conditioning.
    """

    images: tuple[EditedImage, ...]
    self_steps: StepRange
    threshold: float = 0.3
    source_unguided: bool = False
    keep_masks: Callable[[Tensor, Tensor], None] | None = None
    blend_regions: bool = False

    @property
    def group_size(self) -> int:
        """Number of images in a group, the source included."""
        return 1 + len(self.images)

    @property
    def has_local_blend(self) -> bool:
        """Whether any of the edited images has local blend."""
        return any(image.has_local_blend for image in self.images)

    @property
    def is_neutral(self) -> bool:
        """Whether the images of a group are sampled independently of each other."""
        steps = [self.self_steps, *(each for image in self.images for each in image.steps)]
        is_blended = self.has_local_blend or self.blend_regions
        return all(each.is_empty for each in steps) and not is_blended and not self.source_unguided


class Box(NamedTuple):
    """A rectangle of an image, in fractions of the image's width and height.

    Args:
        x: Distance from the left edge.
        y: Distance from the upper edge.
        width: Width of the rectangle.
        height: Height of the rectangle.
    """

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, eq=False)
class Region:
    """A region of the image that attends to a prompt of its own; :mod:`.regions` says how several share a pixel.

    Args:
        context: The region's prompt as the text encoder gives it, of shape [rows, tokens, width]; rows as the
            conditioning's own, or one for all images.
        mask: Where the region is, of shape [B or 1, H, W] in 0..1 and of any size; or a box.
        strength: Factor on the mask: below 1 the rest is left to the scene, above 1 it outweighs other regions.
        feather: Width of the soft edge, as a fraction of the image's shorter edge; half of it is inside.
        base_share: Share of the region's weight that is left to the scene, 0..1.
        steps: The steps in which it applies.
        edits: Edits of the region's own prompt.
        words: Words of the region's prompt in order; empty if they are not known.
    """

    context: Tensor
    mask: Tensor | Box
    strength: float = 1.0
    feather: float = 0.0
    base_share: float = 0.0
    steps: StepRange = StepRange()
    edits: tuple[Edit, ...] = ()
    words: tuple[TokenSpan, ...] = ()

    def has_layout_of(self, other: Region) -> bool:
        """Whether this region is where another one is, with the same strength and in the same steps."""
        settings, others = (
            (each.strength, each.feather, each.base_share, each.steps, isinstance(each.mask, Box))
            for each in (self, other)
        )
        if settings != others:
            return False
        if isinstance(self.mask, Tensor) and isinstance(other.mask, Tensor):
            return torch.equal(self.mask, other.mask)
        return tuple(self.mask) == tuple(other.mask)

    @property
    def covers_everything(self) -> bool:
        """Whether only this region's prompt counts, in every pixel and step."""
        if isinstance(self.mask, Box):
            is_full = self.mask.x <= 0 and self.mask.y <= 0 and min(self.mask.width, self.mask.height) >= 1
        else:
            is_full = bool((self.mask >= 1).all())
        is_alone = self.strength >= 1 and self.base_share == 0
        return is_full and is_alone and self.steps.start <= 0 and self.steps.end >= 1

    @property
    def is_neutral(self) -> bool:
        """Whether the scene's prompt counts alone, in every pixel and step."""
        has_mask = isinstance(self.mask, Box) or bool(self.mask.any())
        return not has_mask or self.strength == 0 or self.base_share == 1 or self.steps.is_empty


Edit = Reweight | PromptToPrompt | Region


def regions_of(edits: Sequence[Edit]) -> list[Region]:
    """Return those of some edits that are regions."""
    return [edit for edit in edits if isinstance(edit, Region)]
