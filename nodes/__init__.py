"""What a person sees in the graph."""

from . import background, blend, keep, load, prompt, subject

NODES = [*load.NODES, *subject.NODES, *prompt.NODES, *blend.NODES, *keep.NODES, *background.NODES]
