"""The host's node API, imported in this one place, and the pack's own socket types and widgets."""

from typing import TypeVar

from comfy_api.v0_0_2 import ComfyExtension, io

CATEGORY = "BLIP-Diffusion"

#: Carries a :class:`~blip_qformer.subject.Subject`.
BlipSubject = io.Custom("BLIP_SUBJECT")

#: Carries a :class:`~.host.managed.ManagedEncoder`.
Blip2QFormer = io.Custom("BLIP2_QFORMER")

#: Carries an :class:`~blip_qformer.attention.maps.AttentionRecord`, filled while the sampler runs.
RecordedAttention = io.Custom("BLIP_ATTENTION_RECORD")

WidgetT = TypeVar("WidgetT", bound=io.Input)


def advanced(widget: WidgetT) -> WidgetT:
    """Mark a widget as one that few people need: the frontend folds it away under "Show advanced".

    Args:
        widget: Input that is marked in place.
    """
    widget.extra_dict = {**widget.extra_dict, "advanced": True}
    return widget


def fraction_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """Return a slider for a fraction of the schedule: 0 is before the first step, 1 behind the last.

    Args:
        name: Name of the input.
        default: Its default.
        tooltip: Its help.
    """
    display = io.NumberDisplay.slider
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, display_mode=display, tooltip=tooltip)


def text_input(name: str, tooltip: str) -> io.String.Input:
    """Return an advanced input for the text of a stock conditioning, which does not know its words.

    Args:
        name: Name of the input.
        tooltip: Its help.
    """
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
