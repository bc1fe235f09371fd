"""What a node's inputs come from in the graph that is running."""

from __future__ import annotations

import json
from functools import cache
from hashlib import sha256

from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import is_link


def ancestors_hash(graph: DynamicPrompt, node_id: str) -> str:
    """Hash a node with its widgets and everything that it gets its inputs from, however the nodes are numbered.

    Args:
        graph: The graph that is running, as the hidden input ``dynprompt`` gives it.
        node_id: The node, as the hidden input ``unique_id`` gives it.

    Returns:
        The hash in hexadecimal digits.
    """

    @cache
    def hash_of(node_id: str) -> str:
        node = graph.get_node(node_id)
        inputs = {
            name: [hash_of(value[0]), value[1]] if is_link(value) else value for name, value in node["inputs"].items()
        }
        return sha256(json.dumps([node["class_type"], inputs], sort_keys=True, default=repr).encode()).hexdigest()

    return hash_of(node_id)
