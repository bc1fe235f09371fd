"""CLIPSeg under the host's memory management."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
from torch import Tensor

from ..blip_qformer.training.segmentation import Segmenter


class HostedSegmenter:
    """A CLIPSeg that the host loads when it is used and takes away when it needs the memory."""

    def __init__(self, folder: Path) -> None:
        management = comfy.model_management
        self.patcher = comfy.model_patcher.ModelPatcher(
            Segmenter(folder),
            load_device=management.text_encoder_device(),
            offload_device=management.text_encoder_offload_device(),
        )

    def __call__(self, picture: Tensor, word: str) -> Tensor:
        """Where in a picture [H, W, 3] that is what the word names; probabilities [H, W]."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.model(picture[None], word)[0]
