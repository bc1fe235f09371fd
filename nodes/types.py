"""The pack's two socket types, and the one place where the host's node API is imported."""

from comfy_api.v0_0_2 import ComfyExtension, io

CATEGORY = "BLIP-Diffusion"

#: A :class:`~blip_qformer.subject.Subject`.
BlipSubject = io.Custom("BLIP_SUBJECT")

#: A :class:`~.qformer.HostedQFormer`.
Blip2QFormer = io.Custom("BLIP2_QFORMER")

__all__ = ["CATEGORY", "Blip2QFormer", "BlipSubject", "ComfyExtension", "io"]
