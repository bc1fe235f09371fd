"""Subject Fidelity: images compared with a subject by the Q-Former, under the host's memory management."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...blip_qformer.encoder.preprocessing import PreprocessingMode
from ...blip_qformer.subject import Subject
from ...blip_qformer.subject.fidelity import Fidelity, likeness, reference_rows
from .lists import merge_batches
from .managed import ManagedEncoder


def measure_fidelity(
    qformer: ManagedEncoder,
    images: Sequence[Tensor],
    subjects: Sequence[Subject],
    preprocessing: PreprocessingMode,
    reference: Sequence[Tensor] | None,
    prompt: str,
    without_subject: Sequence[Tensor] | None,
) -> Fidelity:
    """Compare images with a subject, and with an image of the prompt alone if there is one.

    Args:
        qformer: Subject encoder.
        images: Images in batches of shape [B, H, W, C] in 0..1, each of a size of its own.
        subjects: One subject for all images, or as many rows as images.
        preprocessing: How an image becomes a square, one of ``PREPROCESSING_MODES``.
        reference: Images of the thing itself in such batches, compared with in place of the subject's vectors.
        prompt: Prompt without the subject; empty if it is not compared.
        without_subject: Images that the prompt gives without the subject, in such batches, or None.

    Returns:
        The scores of all N images.

    Raises:
        ValueError: The images or subjects cannot be used, or there is a prompt without its image or the reverse.
    """
    if bool(prompt) != (without_subject is not None):
        missing = "a picture drawn from it at without_subject" if prompt else "what was drawn at prompt"
        raise ValueError(
            f"To compare with a prompt, prompt and without_subject belong together, but only one is there: add "
            f"{missing}, or leave both empty."
        )
    subject = reference_rows(subjects, sum(map(len, images)))
    batches = merge_batches(images)
    rows = subject.vectors
    if reference is not None:
        rows = qformer.encode(merge_batches(reference), subject.word, preprocessing).mean(dim=0, keepdim=True)
    vectors = qformer.encode(batches, subject.word, preprocessing)
    like = likeness(vectors, rows.to(vectors.device))
    if without_subject is None:
        return Fidelity(tuple(like.tolist()))
    alone = qformer.encode(merge_batches(without_subject), prompt, preprocessing).mean(dim=0)
    agree = likeness(qformer.encode(batches, prompt, preprocessing), alone)
    return Fidelity(tuple(like.tolist()), tuple(agree.tolist()))


def pick(images: Sequence[Tensor], index: int) -> Tensor:
    """Return one image of several batches.

    Args:
        images: Batches of shape [B, H, W, C].
        index: Number of the image in all of them, from 0.

    Returns:
        The image, of shape [1, H, W, C].
    """
    return [image for batch in images for image in batch.split(1)][index]
