"""The pack's socket types and widgets, and the one place where the host's node API is imported."""

from comfy_api.v0_0_2 import ComfyExtension, io

CATEGORY = "BLIP-Diffusion"

#: A :class:`~blip_qformer.subject.Subject`.
BlipSubject = io.Custom("BLIP_SUBJECT")

#: A :class:`~.qformer.ManagedEncoder`.
Blip2QFormer = io.Custom("BLIP2_QFORMER")

#: An :class:`~blip_qformer.attention.maps.AttentionRecord`, filled while the sampler runs.
RecordedAttention = io.Custom("BLIP_ATTENTION_RECORD")


def advanced(widget: io.Input) -> io.Input:
    """Mark a widget as one that few people need: the frontend folds it away under "Show advanced"."""
    widget.extra_dict = {**widget.extra_dict, "advanced": True}
    return widget


def fraction_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """Return a slider for a fraction of the schedule: 0 is before the first step, 1 behind the last."""
    display = io.NumberDisplay.slider
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, display_mode=display, tooltip=tooltip)


def text_input(name: str, tooltip: str) -> io.String.Input:
    """Return an advanced input for the text of a stock conditioning, which does not know its words."""
    return advanced(io.String.Input(name, optional=True, default="", multiline=True, tooltip=tooltip))


__all__ = [
    "CATEGORY",
    "Blip2QFormer",
    "BlipSubject",
    "ComfyExtension",
    "RecordedAttention",
    "advanced",
    "fraction_input",
    "io",
    "text_input",
]
