"""Where in a picture a thing is that is known by its name: CLIPSeg, Lüddecke and Ecker (arXiv 2112.10003)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED = "CIDAS/clipseg-rd64-refined"


class Segmenter(nn.Module):
    """A CLIPSeg and what prepares its inputs; it may be moved to any device."""

    def __init__(self, folder: str | Path) -> None:
        """Read a checkpoint folder in the Hub's layout; nothing is looked for elsewhere.

        Raises:
            ValueError: there is no such folder, or no CLIPSeg in it.
        """
        # Imported here because that takes seconds, and the pack's other nodes need none of it.
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        super().__init__()
        check_segmentation_folder(folder)
        try:
            self.processor = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
            model = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # by what the folder holds instead
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{folder} cannot be read as a CLIPSeg ({reason}): download {PUBLISHED} again, the whole folder."
            ) from error
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: Tensor, word: str) -> Tensor:
        """How probable it is, for each pixel, that it belongs to what the word names.

        Args:
            pictures: [B, H, W, 3] in 0..1.

        Returns:
            [B, H, W] in 0..1, float32, on the pictures' device.
        """
        height, width = pictures.shape[1:3]
        arrays = [(picture.cpu().numpy() * 255).round().astype(np.uint8) for picture in pictures]
        inputs = {
            **self.processor.image_processor(arrays, return_tensors="pt"),  # pixel_values [B, 3, 352, 352]
            **self.processor.tokenizer([word] * len(arrays), padding=True, return_tensors="pt"),
        }
        logits = self.model(**{name: tensor.to(self.model.device) for name, tensor in inputs.items()}).logits
        logits = logits.reshape(len(arrays), 1, *inputs["pixel_values"].shape[2:])  # transformers drops a batch of one
        probability = logits.float().sigmoid().to(pictures.device)
        return F.interpolate(probability, size=(height, width), mode="bilinear", antialias=True)[:, 0]


def check_segmentation_folder(folder: str | Path) -> None:
    """Refuse, in one sentence, a folder that holds no checkpoint.

    Raises:
        ValueError: it is not there, or has no config.json.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} is no folder with a CLIPSeg checkpoint (config.json is missing): download one with "
            f"hf download {PUBLISHED} --local-dir {folder}."
        )
