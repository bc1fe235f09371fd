"""Edits that get lost in the graph: conditioning_from of Concat and Average gives its tensor and nothing else.

No sampler can say so, because nothing of the edit comes to it. The host shows a node the graph it stands in.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

from comfy_api.v0_0_2 import io

from ..conditioning import Conditioning
from .hooks import get_edits

log = logging.getLogger("blip_diffusion")

Graph = dict[str, dict[str, Any]]  # the host's: node's id -> {"class_type": ..., "inputs": {name: value or [id, slot]}}

#: Stock nodes that keep the tensor alone of what comes to this input.
LOSES = {"ConditioningConcat": "conditioning_from", "ConditioningAverage": "conditioning_from"}


def require_edits_kept(hidden: io.HiddenHolder | None, given: Conditioning, returned: Conditioning) -> None:
    """Do what :func:`require_kept` does, if a node's first output carries edits that it has from this node.

    Args:
        hidden: What the host shows the node of the graph; None outside of it.
        given: Conditioning that the node was given.
        returned: Its first output, the same object if the node does nothing.

    Raises:
        ValueError: As there.
    """
    if returned is not given and any(get_edits(returned)):
        require_kept(hidden)


def require_kept(hidden: io.HiddenHolder | None) -> None:
    """Refuse a graph in which all that a node's first output carries gets lost; warn where some of it does.

    Args:
        hidden: What the host shows the node of the graph; None outside of it.

    Raises:
        ValueError: If the conditioning comes to an input that loses what it carries, directly or through other nodes,
            and to no sampler without such an input between.
    """
    graph, start = (hidden.prompt, hidden.unique_id) if hidden is not None else (None, None)
    if not graph or start is None:
        return
    outputs, seen = [(str(start), 0)], set()
    lost, is_used = "", False
    while outputs:
        output = outputs.pop()
        if output in seen:
            continue
        seen.add(output)
        for node, name in consumers(graph, output):
            kind = graph[node]["class_type"]
            if LOSES.get(kind) == name:
                lost = lost or (
                    f"This node's conditioning comes to {name} of {kind}, which takes over nothing of an edit or a "
                    "recording: connect it to conditioning_to there, or put this node behind that one."
                )
                continue
            slots = conditioning_slots(kind, name)
            is_used = is_used or not slots  # a sampler or a guider
            outputs.extend((node, slot) for slot in slots)
    if lost and not is_used:
        raise ValueError(lost)
    if lost:
        log.warning("Node %s, %s: %s", start, graph[str(start)]["class_type"], lost)


def consumers(graph: Graph, output: tuple[str, int]) -> Iterator[tuple[str, str]]:
    """Yield id and input name of every node that takes an output.

    Args:
        graph: The host's graph.
        output: Id of a node and number of its output.
    """
    for node, settings in graph.items():
        for name, value in settings.get("inputs", {}).items():
            if isinstance(value, list) and len(value) == 2 and (str(value[0]), value[1]) == output:
                yield node, name


def conditioning_slots(kind: str, name: str) -> list[int]:
    """Return the outputs of a node that may hand on the conditioning of one of its inputs.

    Args:
        kind: The node's class in the host.
        name: Name of the input.

    Returns:
        Numbers of its conditioning outputs; where one has the input's name, such as ``positive``, that one alone.
    """
    node = importlib.import_module("nodes").NODE_CLASS_MAPPINGS.get(kind)  # the host's module, not the pack's
    slots = [slot for slot, each in enumerate(getattr(node, "RETURN_TYPES", ())) if each == "CONDITIONING"]
    names = getattr(node, "RETURN_NAMES", None) or ()
    same = [slot for slot in slots if slot < len(names) and names[slot] == name]
    return same or slots
