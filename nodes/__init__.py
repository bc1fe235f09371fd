"""What a person sees in the graph."""

from . import load, prompt, subject

NODES = [*load.NODES, *subject.NODES, *prompt.NODES]
