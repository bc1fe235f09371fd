"""The nodes of the pack; each module defines some and ends with ``NODES``."""

from . import (
    attention_edit,
    attention_map,
    composite,
    download,
    encode,
    fidelity,
    finetune,
    interpolate,
    inversion,
    loaders,
    prompt,
    regions,
    subject_files,
)
from .host.plain_errors import with_plain_errors

NODES = [
    with_plain_errors(node)
    for module in (
        loaders,
        encode,
        prompt,
        interpolate,
        subject_files,
        attention_edit,
        regions,
        inversion,
        attention_map,
        composite,
        finetune,
        fidelity,
        download,
    )
    for node in module.NODES
]
