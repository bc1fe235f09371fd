"""A prompt with several subjects, one for each image, in a sampler that draws fewer images.

The host leaves out the rows that it has no image for, without a word. What it asks for the rows of a batch is the
prompt's entry in a conditioning's ``model_conds``, which it makes at the start of each run and puts into a copy of that
dictionary. So the dictionary is one that puts a prompt there that counts the images. It needs no hook, with which a
host with dynamic memory would load the checkpoint a second time, and no further key, by which the host would part
positive and negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.conds
from torch import Tensor

from .conditioning import Conditioning

PROMPT = "c_crossattn"  # the host's key for the prompt's entry


class PromptOfSubjects(comfy.conds.CONDCrossAttn):
    """The host's object for a prompt, of a prompt with one row for each subject."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> comfy.conds.CONDCrossAttn:
        """Return the rows for a batch.

        Args:
            batch_size: Number of images.
            **kwargs: The host's.

        Raises:
            ValueError: If there are fewer images than subjects.
        """
        prompt: Tensor = self.cond
        if len(prompt) > batch_size:
            raise ValueError(
                f"The sampler draws {batch_size} picture(s), but this prompt needs {len(prompt)} side by side, one for "
                "each subject: connect Subject Trajectory's latent output to the sampler, or an Empty Latent Image "
                f"with batch_size {len(prompt)}."
            )
        return comfy.conds.CONDCrossAttn(prompt).process_cond(batch_size, **kwargs)


class ModelCondsOfSubjects(dict[str, Any]):
    """What a conditioning gives the model, in which a prompt of some rows needs an image for each of them.

    Args:
        model_conds: What else the conditioning gives the model.
        rows: Number of rows of the prompt; a prompt of another number is not ours any more.
    """

    def __init__(self, model_conds: Mapping[str, Any], rows: int) -> None:
        super().__init__(model_conds)
        self.rows = rows

    def __setitem__(self, key: str, cond: Any) -> None:
        """Put in an entry; the host does so with the prompt's when a run starts.

        Args:
            key: The host's key.
            cond: The host's object.
        """
        if key == PROMPT and len(cond.cond) == self.rows:
            cond = PromptOfSubjects(cond.cond)
        super().__setitem__(key, cond)

    def copy(self) -> ModelCondsOfSubjects:
        """Return a copy of the same kind."""
        return ModelCondsOfSubjects(self, self.rows)


def expect_an_image_for_each_subject(conditioning: Conditioning) -> Conditioning:
    """Return a conditioning of several rows that a sampler refuses if it draws fewer images.

    Args:
        conditioning: Conditioning with one row for each subject; with a single one it is returned as it is.
    """
    if all(len(tensor) == 1 for tensor, _ in conditioning):
        return conditioning
    return [
        [tensor, {**options, "model_conds": ModelCondsOfSubjects(options.get("model_conds", {}), len(tensor))}]
        for tensor, options in conditioning
    ]
