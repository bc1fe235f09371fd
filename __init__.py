"""BLIP-Diffusion for ComfyUI: show it a picture of a thing and name it, and every SD1.5 graph can draw that thing."""

from .nodes import NODES
from .nodes.host.model_paths import register_model_folders
from .nodes.host.samples import add_samples
from .nodes.types import ComfyExtension, io

WEB_DIRECTORY = "./web"


class BLIPDiffusionExtension(ComfyExtension):
    """The pack as the host's loader sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return all node classes."""
        return NODES


async def comfy_entrypoint() -> BLIPDiffusionExtension:
    """Register the model folders and add the sample pictures; the host's loader calls this once, before the nodes.

    Not in ``on_load``, which 0.3.75 does not call.
    """
    register_model_folders()
    add_samples()
    return BLIPDiffusionExtension()
