"""The host's node API, imported in this one place, and the pack's own socket types and widgets."""

from typing import TypeVar

from comfy_api.v0_0_2 import ComfyExtension, io, ui

from ..blip_qformer.subject.blending import BLEND_MODES
from .host.model_paths import CHECKPOINTS
from .host.versions import newer_fields

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


def slider_input(name: str, default: float, tooltip: str, minimum: float, maximum: float) -> io.Float.Input:
    """Return a slider in hundredths.

    Args:
        name: Name of the input.
        default: Default of the input.
        tooltip: Help text of the input.
        minimum: Value at the left end.
        maximum: Value at the right end.
    """
    display = io.NumberDisplay.slider
    return io.Float.Input(
        name, default=default, min=minimum, max=maximum, step=0.01, display_mode=display, tooltip=tooltip
    )


def fraction_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """Return a slider for a fraction of the schedule: 0 is before the first step, 1 behind the last.

    Args:
        name: Name of the input.
        default: Default of the input.
        tooltip: Help text of the input.
    """
    return slider_input(name, default, tooltip, 0.0, 1.0)


def text_input(name: str, tooltip: str) -> io.String.Input:
    """Return an advanced input for the text of a stock conditioning, which does not know its words.

    Args:
        name: Name of the input.
        tooltip: Help text of the input.
    """
    return advanced(io.String.Input(name, optional=True, default="", multiline=True, tooltip=tooltip))


def model_input() -> io.Model.Input:
    """Return the optional MODEL input of the nodes that edit or record attention."""
    return io.Model.Input(
        "model",
        optional=True,
        tooltip="Can stay empty. To save memory on new versions of ComfyUI, connect the model here, and the model "
        "output of this node to the sampler. Then the model is not loaded a second time. The picture is the same.",
    )


def model_output() -> io.Model.Output:
    """Return the MODEL output that goes with :func:`model_input`."""
    return io.Model.Output(
        display_name="model",
        tooltip="Connect it to the sampler if you connected a model to this node. Otherwise leave it empty.",
    )


def checkpoint_input() -> io.Combo.Input:
    """Return the drop-down list of checkpoints that all loaders have."""
    return io.Combo.Input(
        "checkpoint",
        options=CHECKPOINTS.options(),
        tooltip="The model: a folder or a file in models/blip_diffusion, or a BLIP-Diffusion folder in "
        "models/diffusers. For example Salesforce/blipdiffusion as downloaded, a folder that the authors' own code "
        "(LAVIS) uses, a fine-tuned .pth file, or blip2_qformer.safetensors. Press R after you put a new one there.",
    )


def blend_mode_input() -> io.Combo.Input:
    """Return the drop-down list of blend modes that both blending nodes have."""
    return advanced(
        io.Combo.Input(
            "mode",
            options=list(BLEND_MODES),
            default=BLEND_MODES[0],
            tooltip="How the subjects are mixed. linear: the plain average, as the authors do. spherical: goes from "
            "one subject to the other at an even speed. norm-preserving: the average, made as strong as the subjects; "
            "try it if the middle of a mix looks dull.",
        )
    )


__all__ = [
    "CATEGORY",
    "Blip2QFormer",
    "BlipSubject",
    "ComfyExtension",
    "RecordedAttention",
    "advanced",
    "blend_mode_input",
    "checkpoint_input",
    "fraction_input",
    "io",
    "model_input",
    "model_output",
    "newer_fields",
    "slider_input",
    "text_input",
    "ui",
]
