"""The course of a fine-tuning as an image: the loss of each step, the validation scores, and the step that was kept."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .validation import Score

SIZE = (768, 384)
MARGIN = 56
BACKGROUND, AXIS = "white", "#444444"
LOSS, SMOOTHED, LIKENESS, AGREEMENT, KEPT = "#c9d7ea", "#2b6cb0", "#c05621", "#2f855a", "#888888"
SMOOTHING = 9  # steps

Point = tuple[float, float]


def loss_curve(losses: Sequence[float], scores: Sequence[Score] = (), kept_step: int | None = None) -> Image.Image:
    """Plot a fine-tuning.

    Args:
        losses: The loss of each step, without NaN.
        scores: The scores of the steps that were validated.
        kept_step: The step whose weights were kept; None draws no line.

    Returns:
        An RGB image.
    """
    image = Image.new("RGB", SIZE, BACKGROUND)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    width, height = SIZE[0] - 2 * MARGIN, SIZE[1] - 2 * MARGIN
    last = max(len(losses), 1)
    top = max([*losses, 1e-12])

    def at(step: float, fraction: float) -> Point:
        return MARGIN + step / last * width, MARGIN + (1 - fraction) * height

    pen.line([at(0, 1), at(0, 0), at(last, 0)], fill=AXIS, width=1)
    pen.text(at(0, -0.04), "0", AXIS, font)
    pen.text(at(last, -0.04), str(last), AXIS, font, anchor="ra")
    pen.text((MARGIN - 6, MARGIN), f"{top:.3f}", AXIS, font, anchor="ra")
    if kept_step is not None:
        pen.line([at(kept_step, 0), at(kept_step, 1)], fill=KEPT, width=2)
        pen.text(at(kept_step, -0.04), f"kept: {kept_step}", KEPT, font, anchor="ma")
    _line(pen, [at(step, loss / top) for step, loss in enumerate(losses, 1)], LOSS)
    _line(pen, [at(step, loss / top) for step, loss in enumerate(_smooth(losses), 1)], SMOOTHED, 3)
    for name, colour in (("likeness", LIKENESS), ("agreement", AGREEMENT)):
        points = [at(score.step, max(0.0, getattr(score, name))) for score in scores]
        _line(pen, points, colour, 2)
        for x, y in points:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    labels = [("loss", SMOOTHED), ("likeness to the subject", LIKENESS), ("agreement with the prompt", AGREEMENT)]
    x = float(MARGIN)
    for label, colour in labels if scores else labels[:1]:
        pen.text((x, 16), label, colour, font)
        x += pen.textlength(label, font) + 24
    return image


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and those shortly before it."""
    windows = [losses[max(0, end - SMOOTHING) : end] for end in range(1, len(losses) + 1)]
    return [sum(window) / len(window) for window in windows]


def _line(pen: ImageDraw.ImageDraw, points: Sequence[Point], colour: str, width: int = 1) -> None:
    if len(points) > 1:
        pen.line(list(points), fill=colour, width=width, joint="curve")
