"""BLIP-Diffusion for ComfyUI: show it a picture of a thing and name it, and every SD1.5 graph can draw that thing."""

from .nodes import NODES
from .nodes.host.model_paths import register_model_folder
from .nodes.types import ComfyExtension, io

WEB_DIRECTORY = "./web"


class BLIPDiffusionExtension(ComfyExtension):
    """What the host asks a pack for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> BLIPDiffusionExtension:
    """Called once by the host's loader, before it asks for the nodes."""
    register_model_folder()
    return BLIPDiffusionExtension()
