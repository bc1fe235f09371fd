"""The nodes of the pack; each module defines some and ends with ``NODES``."""

from . import (
    attention_edit,
    attention_map,
    composite,
    encode,
    finetune,
    interpolate,
    inversion,
    loaders,
    prompt,
    subject_files,
)

NODES = [
    *loaders.NODES,
    *encode.NODES,
    *prompt.NODES,
    *interpolate.NODES,
    *subject_files.NODES,
    *attention_edit.NODES,
    *inversion.NODES,
    *attention_map.NODES,
    *composite.NODES,
    *finetune.NODES,
]
