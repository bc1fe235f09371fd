"""Finding a subject by its name: CLIPSeg (Lüddecke and Ecker, arXiv 2112.10003)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ..stand_in import stand_in_sentences

HUB_REPO = "CIDAS/clipseg-rd64-refined"


class Segmenter(nn.Module):
    """A CLIPSeg with its processor; it may be moved to any device.

    Args:
        folder: A checkpoint folder in the Hub's layout; nothing is downloaded.

    Raises:
        ValueError: If there is no such folder, or no CLIPSeg in it.
    """

    def __init__(self, folder: str | Path) -> None:
        # Imported here because that takes seconds, and the pack's other nodes need none of it.
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        super().__init__()
        check_segmentation_folder(folder)
        try:
            self.processor: Any = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
            model = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            # Which one depends on what the folder holds.
            if sentences := stand_in_sentences(sorted(Path(folder).glob("*"))):
                raise ValueError(" ".join(sentences)) from error
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{folder} cannot be read as a CLIPSeg ({reason}): download {HUB_REPO} again, the whole folder."
            ) from error
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, word: str) -> Tensor:
        """Compute the probability of each pixel to belong to what a word names.

        Args:
            images: Images of shape [B, H, W, 3] in 0..1.
            word: The name of the subject.

        Returns:
            Probabilities of shape [B, H, W], float32, on the images' device.
        """
        height, width = images.shape[1:3]
        arrays = [(image.cpu().numpy() * 255).round().astype(np.uint8) for image in images]
        inputs = {
            **self.processor.image_processor(arrays, return_tensors="pt"),  # pixel_values [B, 3, 352, 352]
            **self.processor.tokenizer([word] * len(arrays), padding=True, return_tensors="pt"),
        }
        logits = self.model(**{name: tensor.to(self.model.device) for name, tensor in inputs.items()}).logits
        logits = logits.reshape(len(arrays), 1, *inputs["pixel_values"].shape[2:])  # transformers drops a batch of one
        probability = logits.float().sigmoid().to(images.device)
        return F.interpolate(probability, size=(height, width), mode="bilinear", antialias=True)[:, 0]


def check_segmentation_folder(folder: str | Path) -> None:
    """Refuse a folder that holds no checkpoint.

    Args:
        folder: Where the checkpoint should be.

    Raises:
        ValueError: If it is not there, or has no config.json.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} is no folder with a CLIPSeg checkpoint (config.json is missing): download one with "
            f"hf download {HUB_REPO} --local-dir {folder}."
        )
