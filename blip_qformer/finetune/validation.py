"""Choosing the step of a fine-tuning to keep: the Q-Former itself scores images sampled on the way.

A fine-tuned subject should look more like its images and still follow the prompt. So each sampled image is scored
twice: asked about the subject's word, are its vectors like the subject's? And asked about the prompt, are they like
those of the image that the prompt alone gives? In the end likeness is gained at the cost of agreement (overfitting
reproduces the training images), so the step with the highest sum is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..subject.fidelity import likeness

#: What stands behind "a <the subject> <its word>".
VALIDATION_PROMPTS = ("in the snow", "on the grass", "on the beach")

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 7.5  # of the validation images

#: ``(images [B, 3, H, W] in 0..1, words) -> subject vectors [B, 16, width]``
ImageEncoder = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Score:
    """The Q-Former's opinion of one step's images.

    Args:
        step: Number of the step; 0 is before any.
        likeness: Mean cosine similarity to the subject, in -1..1.
        agreement: Mean cosine similarity to the prompts' images, in -1..1.
    """

    step: int
    likeness: float
    agreement: float

    @property
    def total(self) -> float:
        """The sum by which steps are compared."""
        return self.likeness + self.agreement


class Validation:
    """Scores the validation images of one subject.

    Args:
        encode_images: The Q-Former.
        word: The subject's word.
        vectors: The mean of the training images' vectors before fine-tuning, of shape [16, width].
        prompts: The validation prompts, without the subject and its word.
        baseline: The prompts' images without the subject before fine-tuning, sampled from the same noise; of shape
            [P, 3, H, W] in 0..1.
    """

    def __init__(
        self, encode_images: ImageEncoder, word: str, vectors: Tensor, prompts: Sequence[str], baseline: Tensor
    ) -> None:
        self.encode_images, self.word, self.vectors, self.prompts = encode_images, word, vectors, tuple(prompts)
        self._prompt_vectors = encode_images(baseline, self.prompts)  # [P, 16, width]
        self.scores: list[Score] = []

    @property
    def best(self) -> Score:
        """The score with the highest total, the earlier of two; step 0 does not count as soon as there is another."""
        return max(self.scores[1:] or self.scores, key=lambda score: score.total)

    def add(self, step: int, samples: Tensor) -> bool:
        """Score a step's images, those before any step first.

        Args:
            step: Number of the step; 0 is before any.
            samples: An image for each prompt, of shape [P, 3, H, W] in 0..1.

        Returns:
            Whether this is the best step so far.
        """
        self.scores.append(self._score(step, samples))
        return self.best is self.scores[-1]

    def _score(self, step: int, samples: Tensor) -> Score:
        subject_vectors = self.encode_images(samples, [self.word] * len(samples))  # [P, 16, width]
        prompt_vectors = self.encode_images(samples, self.prompts)  # [P, 16, width]
        like, agree = likeness(subject_vectors, self.vectors), likeness(prompt_vectors, self._prompt_vectors)
        return Score(step, float(like.mean()), float(agree.mean()))


def validation_noise(prompts: int, shape: Sequence[int]) -> Tensor:
    r"""Sample the noise that all validations begin with, the same on every device.

    Args:
        prompts: Number P of prompts; each has a seed of its own.
        shape: Shape of one latent.

    Returns:
        Standard normal noise of shape [P, \*shape].
    """
    generators = [torch.Generator().manual_seed(index) for index in range(prompts)]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def preview_grid(samples: Sequence[Tensor]) -> Tensor:
    """Lay out validation images, a row for each prompt and a column for each validation.

    Args:
        samples: The V validations' images, each of shape [P, 3, H, W].

    Returns:
        One image of shape [P * H, V * W, 3].
    """
    return rearrange(torch.stack(list(samples)).cpu(), "v p c h w -> (p h) (v w) c")
