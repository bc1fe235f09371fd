"""Finding a subject by its name: CLIPSeg (Lüddecke and Ecker, arXiv 2112.10003)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.components import find_weights
from ..checkpoint.module_tree import count_children
from ..checkpoint.read_tensors import read_config
from ..checkpoint.weights import is_finite
from ..limits import MAX_VOCABULARY, MAX_WIDTH
from ..plain_data import shown
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
            _check_sizes(Path(folder))
            self.processor: Any = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
            model = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True)
        except MemoryError:
            raise
        except Exception as error:  # which one depends on what the folder holds
            if sentences := stand_in_sentences(sorted(Path(folder).glob("*"))):
                raise ValueError(" ".join(sentences)) from error
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{folder} cannot be read as a CLIPSeg ({reason}): download {HUB_REPO} again, the whole folder."
            ) from error
        for weight in chain(model.parameters(), model.buffers()):
            weight.data = weight.data.clone()  # one by one: transformers leaves them mapped to the file
        if damaged := [name for name, weight in model.named_parameters() if not is_finite(weight)]:
            raise ValueError(f"{folder} holds NaN or infinity in {damaged[0]}: download {HUB_REPO} again.")
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


def _check_sizes(folder: Path) -> None:
    """Compare the sizes in a CLIPSeg's config with its weights, because transformers builds whatever a config asks for.

    Raises:
        ValueError: They differ, or there are no weights.
    """
    config, weights = read_config(folder), find_weights(folder)
    for name in ("text_config", "vision_config"):
        sizes = config.get(name, {})
        if not isinstance(sizes, dict):
            raise ValueError(f"config.json sets {name} to {shown(sizes)}, where a group of values is needed")
        model = f"clip.{name.removesuffix('_config')}_model"
        layers, held = sizes.get("num_hidden_layers", 12), count_children(weights, f"{model}.encoder.layers")
        if layers != held:
            raise ValueError(f"config.json tells of {shown(layers)} layers of {model} and its weights hold {held}")
    for size in _numbers(config):
        if not -MAX_WIDTH <= size <= MAX_VOCABULARY:
            raise ValueError(f"config.json asks for a size of {shown(size)}, which no CLIPSeg has")


def _numbers(value: Any) -> Iterator[float]:
    """Yield all numbers in nested values of JSON."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value
