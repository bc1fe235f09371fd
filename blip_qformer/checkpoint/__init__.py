"""Read and write weights: every published layout, recognised by the keys of its tensors.

From a path to an encoder, in this order: ``read_tensors`` (a file), ``detect`` (what it is), ``components`` (a folder),
``layouts`` and ``key_map`` (a published layout's keys to the encoder's), ``infer_config`` (sizes), ``open``. The way
back: ``write_safetensors``, ``layouts/single_file``, and for Stable Diffusion's networks ``ldm_keys``.
"""

from .components import Component
from .layouts.single_file import save_qformer
from .open import Checkpoint, load_subject_encoder, open_checkpoint
from .read_tensors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "Component", "load_subject_encoder", "open_checkpoint", "save_qformer"]
