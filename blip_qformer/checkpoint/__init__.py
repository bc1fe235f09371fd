"""Reading and writing weights: every published layout, recognised by the names of its tensors."""

from .components import Component
from .layouts.single_file import save_qformer
from .open import Checkpoint, load_subject_encoder, open_checkpoint
from .read_tensors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "Component", "load_subject_encoder", "open_checkpoint", "save_qformer"]
