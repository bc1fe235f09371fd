"""What a person sees of a fine-tuning: the progress bar while it runs, then curve, validation images and report."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.utils
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...blip_qformer.finetune.loop import FinetuneResult, StepCallback
from ...blip_qformer.finetune.loss_curve import loss_curve
from ...blip_qformer.finetune.validation import preview_grid
from ...blip_qformer.imaging.pil import to_pil_image

PREVIEW_EDGE = 512  # pixels, the longer one


def show_progress(steps: int) -> StepCallback:
    """Return a step callback that fills the host's progress bar.

    Args:
        steps: Number of all steps.
    """
    progress = comfy.utils.ProgressBar(steps)

    def on_step(losses: Sequence[float], samples: Sequence[Tensor]) -> None:
        progress.update_absolute(len(losses), steps, ("JPEG", progress_image(losses, samples), PREVIEW_EDGE))

    return on_step


def progress_image(losses: Sequence[float], samples: Sequence[Tensor]) -> Image.Image:
    """Plot the losses so far above the last validation images.

    Args:
        losses: Loss of each step so far.
        samples: Images of each validation so far, each of shape [P, 3, H, W] in 0..1.
    """
    curve = loss_curve(losses)
    if not samples:
        return curve
    row = rearrange(samples[-1], "prompt c h w -> h (prompt w) c").cpu()
    images = to_pil_image(row)
    images = images.resize((curve.width, round(images.height * curve.width / images.width)))
    both = Image.new("RGB", (curve.width, curve.height + images.height))
    both.paste(curve, (0, 0))
    both.paste(images, (0, curve.height))
    return both


def curve_image(result: FinetuneResult) -> Tensor:
    """Plot losses, scores and the step that was kept.

    Args:
        result: The course of the fine-tuning.

    Returns:
        An image batch of shape [1, H, W, 3] in 0..1.
    """
    curve = loss_curve(result.losses, result.scores, result.kept_step)
    pixels = torch.frombuffer(bytearray(curve.tobytes()), dtype=torch.uint8)
    return rearrange(pixels, "(h w c) -> 1 h w c", h=curve.height, c=3) / 255


def preview_image(result: FinetuneResult) -> Tensor:
    """Lay out all validation images.

    Args:
        result: The course of the fine-tuning.

    Returns:
        An image batch of shape [1, H, W, 3] in 0..1; one black pixel if there was no validation.
    """
    return preview_grid(result.samples)[None] if result.samples else torch.zeros(1, 1, 1, 3)


def describe_result(result: FinetuneResult, trains: str) -> str:
    """Say in words what was trained and which step was kept.

    Args:
        result: The course of the fine-tuning.
        trains: Which weights trained, in the user's words.
    """
    heading = f"{trains}: {len(result.losses)} steps, step {result.kept_step} kept."
    lines = [
        f"step {score.step}: likeness {score.likeness:.3f}, agreement {score.agreement:.3f}, together {score.total:.3f}"
        for score in result.scores
    ]
    return "\n".join([heading, *lines])
