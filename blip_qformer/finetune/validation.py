"""Which step of fine-tuning to keep: pictures are drawn on the way, and the Q-Former itself looks at them.

A tuned subject should look more like its pictures and still go where the prompt says. So two questions are asked of
each drawn picture: asked about the subject's word, are its vectors like the subject's; and asked about the prompt, are
they like those of the picture that the prompt alone makes? At the end more of the first is bought with the second
(overfitting draws the training pictures again), and the step where their sum is highest is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

#: What stands behind "a <the subject> <its word>".
VALIDATION_PROMPTS = ("in the snow", "on the grass", "on the beach")


DRAWING_STEPS, GUIDANCE = 20, 7.5


#: ``(pictures [B, 3, H, W] in 0..1, words) -> vectors [B, 16, width]``
Look = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Score:
    """What the Q-Former thinks of a step's pictures; cosines, -1 to 1."""

    step: int
    likeness: float  # to the subject
    agreement: float  # with the prompts

    @property
    def total(self) -> float:
        return self.likeness + self.agreement


class Validation:
    """Scores drawn pictures of one subject.

    Args:
        look: the Q-Former.
        word: for the subject.
        vectors: [16, width], the mean of its pictures' vectors before tuning.
        prompts: what stands in them behind the word.
        plain: [P, 3, H, W] in 0..1, the prompts' pictures without the subject before tuning, from the same noise.
    """

    def __init__(self, look: Look, word: str, vectors: Tensor, prompts: Sequence[str], plain: Tensor):
        self.look, self.word, self.vectors, self.prompts = look, word, vectors, tuple(prompts)
        self._asked_about_prompts = look(plain, self.prompts)
        self.scores: list[Score] = []

    @property
    def best(self) -> Score:
        """The step with the highest total, the earlier of two; no tuning at all does not count as one."""
        return max(self.scores[1:] or self.scores, key=lambda score: score.total)

    def add(self, step: int, drawn: Tensor) -> bool:
        """Score a step's pictures [P, 3, H, W], those before any step first; whether it is the best so far."""
        self.scores.append(self._score(step, drawn))
        return self.best is self.scores[-1]

    def _score(self, step: int, drawn: Tensor) -> Score:
        seen = self.look(drawn, [self.word] * len(drawn))  # [P, 16, width]
        asked = self.look(drawn, self.prompts)
        return Score(step, cosine(seen, self.vectors.expand_as(seen)), cosine(asked, self._asked_about_prompts))


def validation_noise(prompts: int, shape: Sequence[int]) -> Tensor:
    r"""What the pictures of each look begin with, the same on every device; [P, \*shape], standard normal."""
    sources = [torch.Generator().manual_seed(number) for number in range(prompts)]
    return torch.stack([torch.randn(*shape, generator=source) for source in sources])


def preview_strip(drawn: Sequence[Tensor]) -> Tensor:
    """The pictures [P, 3, H, W] of each look, a row for each prompt and a column for each look: [P H, looks W, 3]."""
    return rearrange(torch.stack(list(drawn)).cpu(), "look prompt c h w -> (prompt h) (look w) c")


def cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine of [B, 16, width] and [B, 16, width]."""
    return float(F.cosine_similarity(first.float(), second.float(), dim=-1).mean())
