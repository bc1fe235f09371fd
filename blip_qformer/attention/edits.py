"""What a person asks for: edits of attention, as plain data that travels with a conditioning.

A batch is drawn in groups of pictures: a source and its edits, one behind the other, [source, edit, source, edit].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from .alignment import Alignment
from .schedule import StepRange


@dataclass(frozen=True, eq=False)
class Reweight:
    """Some tokens are heard more or less.

    Args:
        factors: [tokens], of the attention on each.
        steps: when.
        picture: which of a group, 0 being the source; None: all.
    """

    factors: Tensor
    steps: StepRange
    picture: int | None = None

    def lengthened(self, tokens: int) -> Reweight:
        """The same for a prompt to whose end tokens were added."""
        return replace(self, factors=F.pad(self.factors, (0, tokens - len(self.factors)), value=1.0))


@dataclass(frozen=True, eq=False)
class EditedPicture:
    """How one picture of a group follows its source.

    Args:
        alignment: whose attention on the prompt goes where.
        steps: for each of the tokens, when it takes over the source's attention.
        source_words, edited_words: [tokens], 1 at the words of the source's prompt, or of its own, to which the edit
            is kept; None: no such words. Neither: the edit is everywhere.
    """

    alignment: Alignment
    steps: tuple[StepRange, ...]
    source_words: Tensor | None = None
    edited_words: Tensor | None = None

    @property
    def is_blended(self) -> bool:
        return self.source_words is not None or self.edited_words is not None


@dataclass(frozen=True, eq=False)
class PromptToPrompt:
    """Pictures that follow a source (arXiv 2208.01626).

    Args:
        pictures: the edits of a group, from picture 1 on.
        self_steps: when they take over the source's self-attention.
        threshold: of local blend, a part of a map's maximum.
        source_unguided: whether the source is drawn by its conditional prediction alone, as DDIM inversion retraces it.
        keep_masks: called when a run is over with all latents [B, C, H, W] and the masks of local blend [B', H, W],
            one for each edit of each group.
    """

    pictures: tuple[EditedPicture, ...]
    self_steps: StepRange
    threshold: float = 0.3
    source_unguided: bool = False
    keep_masks: Callable[[Tensor, Tensor], None] | None = None

    @property
    def group(self) -> int:
        """Pictures of a group."""
        return 1 + len(self.pictures)

    @property
    def is_blended(self) -> bool:
        return any(picture.is_blended for picture in self.pictures)

    @property
    def is_neutral(self) -> bool:
        """Whether the pictures are drawn as if they had nothing to do with each other."""
        steps = [self.self_steps, *(each for picture in self.pictures for each in picture.steps)]
        return all(each.is_empty for each in steps) and not self.is_blended and not self.source_unguided


Edit = Reweight | PromptToPrompt
