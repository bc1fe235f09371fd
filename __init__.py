"""BLIP-Diffusion for ComfyUI: show it a picture of a thing and name it, and every SD1.5 graph can draw that thing."""

from .nodes import NODES
from .nodes.host.model_paths import register_model_folders
from .nodes.types import ComfyExtension, io

WEB_DIRECTORY = "./web"


class BLIPDiffusionExtension(ComfyExtension):
    """The pack as the host's loader sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return all node classes."""
        return NODES


async def comfy_entrypoint() -> BLIPDiffusionExtension:
    """Register the model folders; the host's loader calls this once, before it asks for the nodes."""
    register_model_folders()
    return BLIPDiffusionExtension()
