"""Reading and writing weights: every published layout, recognised by the names of its tensors."""

from .loading import load_subject_encoder
from .opening import Checkpoint, open_checkpoint
from .parts import Part
from .reading import CheckpointError
from .single_file import save_qformer

__all__ = ["Checkpoint", "CheckpointError", "Part", "load_subject_encoder", "open_checkpoint", "save_qformer"]
