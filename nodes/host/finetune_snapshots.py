"""Where Subject Fine-tune keeps what it needs to go on after ComfyUI has died, and what decides its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor, nn

from ...blip_qformer.finetune.snapshots import Snapshots, snapshot_key

#: Weights that SD1.5's file lacks and nothing here uses: the host leaves in their memory what was there before.
UNUSED = ("text_projection.weight",)


def snapshots_folder() -> Path:
    """Return the folder of snapshots.

    Not in ``temp``, which the host empties when it starts. Folders of ``user`` with two underscores are out of reach of
    the server's routes.
    """
    return Path(folder_paths.get_system_user_directory("blip_diffusion"), "unfinished_finetuning")


def snapshots_of(
    networks: Sequence[nn.Module],
    hashes: Sequence[str],
    images: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    settings: Any,
    options: Any,
) -> Snapshots:
    """Return the snapshots of the fine-tuning that all these values decide.

    Args:
        networks: U-Net, text encoder and VAE, with the patches that are on them.
        hashes: Hashes of the subject encoder, and of the graph before the node: that stands for what no tensor shows,
            such as a function that another node put into the model.
        images: Images to learn from.
        masks: Masks, or None.
        settings: Hyperparameters, a dataclass.
        options: Which weights train and what is shown on the way, a dataclass.
    """
    masks = masks or []
    values = {"settings": asdict(settings), "options": asdict(options), "hashes": [*hashes], "masks": len(masks)}
    weights = [_used_weights(network) for network in networks]
    return Snapshots(snapshots_folder(), snapshot_key(weights, [*images, *masks], values))


def _used_weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in network.state_dict().items() if not name.endswith(UNUSED)}
