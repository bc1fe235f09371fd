"""A prompt with several subjects, one for each image, in a sampler that draws fewer images."""

from __future__ import annotations

from typing import Any, cast

import comfy.samplers
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from .attention.carrier import attach, detach
from .conditioning import Conditioning
from .versions import has_dynamic_memory

#: Key of a conditioning's dictionary for its number of subjects, and reference of the hook that checks it.
SUBJECT_ROWS = "blip_subject_rows"


def expect_an_image_for_each_subject(conditioning: Conditioning) -> Conditioning:
    """Return a conditioning of several rows that a sampler refuses if it draws fewer images.

    The host leaves out the rows that it has no image for. Where its memory is dynamic, the conditioning is returned as
    it is: there, a hook would load the checkpoint a second time.

    Args:
        conditioning: Conditioning with one row for each subject.
    """
    rows = [len(tensor) for tensor, _ in conditioning]
    if max(rows) == 1 or has_dynamic_memory():
        return conditioning
    return attach(conditioning, SUBJECT_ROWS, rows, sample_all_subjects, in_model=False)


def sample_all_subjects(executor: WrapperExecutor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wrap a whole sampling run of the host: refuse it if it would leave out subjects.

    Args:
        executor: What the host would have called; its ``class_obj`` is the guider.
        noise: Noise of shape [B, 4, h, w].
        *args: Further arguments, which are passed on.
        **kwargs: Further arguments, which are passed on.

    Returns:
        Sampled latents of shape [B, 4, h, w].

    Raises:
        ValueError: If there are fewer images than subjects.
    """
    for _, entry, rows in detach(cast(comfy.samplers.CFGGuider, executor.class_obj), SUBJECT_ROWS):
        if len(entry["cross_attn"]) == rows > len(noise):
            raise ValueError(
                f"The sampler draws {len(noise)} picture(s), but this prompt needs {rows} side by side, one for each "
                "subject: connect Subject Trajectory's latent output to the sampler, or an Empty Latent Image with "
                f"batch_size {rows}."
            )
    return executor(noise, *args, **kwargs)
