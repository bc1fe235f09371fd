"""What a person sees in the graph."""

from . import attention, attention_map, background, blend, finetune, inversion, keep, load, prompt, subject

NODES = [
    *load.NODES,
    *subject.NODES,
    *prompt.NODES,
    *blend.NODES,
    *keep.NODES,
    *attention.NODES,
    *inversion.NODES,
    *attention_map.NODES,
    *background.NODES,
    *finetune.NODES,
]
