"""The pack's two socket types, and the one place where the host's node API is imported."""

from comfy_api.v0_0_2 import ComfyExtension, io

CATEGORY = "BLIP-Diffusion"

#: A :class:`~blip_qformer.subject.Subject`.
BlipSubject = io.Custom("BLIP_SUBJECT")

#: A :class:`~.qformer.ManagedEncoder`.
Blip2QFormer = io.Custom("BLIP2_QFORMER")


def advanced(widget: io.Input) -> io.Input:
    """Mark a widget as one that few people need: the frontend folds it away under "Show advanced"."""
    widget.extra_dict = {**widget.extra_dict, "advanced": True}
    return widget


__all__ = ["CATEGORY", "Blip2QFormer", "BlipSubject", "ComfyExtension", "advanced", "io"]
