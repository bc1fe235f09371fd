"""Translate a workflow as the browser saves it into the prompt that the server executes.

A saved workflow lists nodes with their widgets' values in order, links between numbered sockets, and nodes that only
exist on the canvas. A prompt names every input. The frontend translates when a user presses Run; :func:`to_prompt` does
the same without a browser.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

Graph = dict[str, Any]
Node = dict[str, Any]
Prompt = dict[str, dict[str, Any]]
Link = tuple[Any, int]
"""The origin of a link: a node's id and the number of its output."""

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
CANVAS_ONLY = (*NOTES, "Reroute", "PrimitiveNode")
SEEDS = ("seed", "noise_seed")
UPLOADS = ("image_upload", "video_upload", "animated_image_upload")
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
CHOICE = re.compile(r"(?<!\\)\{")
ESCAPED_BRACE = re.compile(r"\\([{}|])")


class WorkflowFormatError(ValueError):
    """A saved workflow that cannot be turned into a prompt."""


@dataclass(frozen=True)
class Widget:
    """One value in a node's ``widgets_values``.

    Attributes:
        name: Input that it sets, or "" for one that only the browser uses (a seed's control, an upload button).
        default: Value if the saved list is too short, as in a graph older than the input.
        has_comments: Whether the browser strips comments from it and chooses from ``{a|b}``.
    """

    name: str
    default: Any = None
    has_comments: bool = False


def to_prompt(graph: Graph, object_info: dict[str, Any]) -> Prompt:
    """Translate a saved workflow (version 0.4) as the frontend's ``graphToPrompt`` does.

    Whatever needs a browser is refused or left alone: subgraphs and ``{a|b}`` choices are errors, ``%date%`` in a file
    name stays as it is, the players of audio and 3D nodes send nothing.

    Args:
        graph: Saved workflow, with ``nodes`` and ``links``.
        object_info: Answer of the server at ``/object_info``.

    Returns:
        Class, inputs and title of each node, by its id.

    Raises:
        WorkflowFormatError: If a node cannot be translated; the message names it.
    """
    if "nodes" not in graph or "links" not in graph:
        raise WorkflowFormatError(
            "This is no saved workflow ('nodes' or 'links' is missing): save it with Save, not Export (API)."
        )
    nodes = {node["id"]: node for node in graph["nodes"]}
    starts = {link[0]: (link[1], link[2]) for link in graph["links"] if link}
    prompt: Prompt = {}
    for node in graph["nodes"]:
        if node["type"] in CANVAS_ONLY or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        definition = _definition(node, object_info)
        inputs = _widget_inputs(node, definition)
        for socket in node.get("inputs", []):
            start = _follow(node, socket, nodes, starts)
            if start is None:
                continue
            origin, output = start
            if nodes[origin]["type"] == "PrimitiveNode":  # its value stands in for the widget's
                inputs[socket["name"]] = nodes[origin]["widgets_values"][0]
            else:
                inputs[socket["name"]] = [str(origin), output]
        title = node.get("title") or definition["display_name"] or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    _drop_links_to_missing_nodes(prompt)
    return prompt


def override(prompt: Prompt, class_type: str, /, **inputs: Any) -> Prompt:
    """Return a copy of a prompt with other inputs in every node of a class: ``override(prompt, "KSampler", steps=2)``.

    Args:
        prompt: Prompt, which is not changed.
        class_type: Class of the nodes.
        **inputs: Values by the names of their inputs.

    Raises:
        KeyError: If the prompt has no node of the class.
    """
    changed = copy.deepcopy(prompt)
    found = [node for node in changed.values() if node["class_type"] == class_type]
    if not found:
        present = ", ".join(sorted({node["class_type"] for node in changed.values()}))
        raise KeyError(f"The prompt has no node of class '{class_type}', only {present}: name one of these.")
    for node in found:
        node["inputs"].update(inputs)
    return changed


def widgets_of(definition: dict[str, Any]) -> list[Widget]:
    """List the widgets that the frontend makes for a node, in the order of ``widgets_values``.

    Args:
        definition: Entry of the node in ``/object_info``.
    """
    widgets: list[Widget] = []
    has_upload = False
    for group in ("required", "optional"):
        for name, specification in definition["input"].get(group, {}).items():
            kind, options = specification[0], (specification[1] if len(specification) > 1 else {})
            kind = options.get("widgetType", kind)
            if options.get("forceInput") or not (isinstance(kind, list) or kind in _DEFAULTS):
                continue
            is_combo = isinstance(kind, list) or kind == "COMBO"
            choices = (kind if isinstance(kind, list) else options.get("options", [])) if is_combo else []
            default = options.get("default", _DEFAULTS["COMBO" if is_combo else kind])
            if default is None and choices:
                default = choices[0]
            widgets.append(Widget(name, default, has_comments=bool(options.get("dynamicPrompts"))))
            if options.get("control_after_generate", kind == "INT" and name in SEEDS):
                widgets += [Widget("")] * (2 if is_combo else 1)  # a combo also gets a filter
            has_upload |= group == "required" and is_combo and any(options.get(key) is True for key in UPLOADS)
    return [*widgets, Widget("")] if has_upload else widgets


_DEFAULTS: dict[str, Any] = {"INT": 0, "FLOAT": 0, "BOOLEAN": False, "STRING": "", "COMBO": None}


def _definition(node: Node, object_info: dict[str, Any]) -> dict[str, Any]:
    if node["type"] not in object_info:
        raise WorkflowFormatError(
            f"{_name(node)} is of a class this server does not have: install the pack it comes from."
        )
    return object_info[node["type"]]


def _widget_inputs(node: Node, definition: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a node's widgets by the names of their inputs."""
    saved = node.get("widgets_values") or []
    inputs: dict[str, Any] = {}
    for position, widget in enumerate(widgets_of(definition)):
        if not widget.name:
            continue
        if isinstance(saved, dict):  # some packs save their widgets by name
            value = saved.get(widget.name, widget.default)
        else:
            value = saved[position] if position < len(saved) else widget.default
        if widget.has_comments and isinstance(value, str):
            value = _plain_text(value, node)
        # The server reads a bare list as a link.
        inputs[widget.name] = {"__value__": value} if isinstance(value, list) else value
    return inputs


def _plain_text(text: str, node: Node) -> str:
    text = COMMENT.sub("", text)
    if CHOICE.search(text):
        raise WorkflowFormatError(
            f"{_name(node)} has '{{' in its text, where the browser would choose at random: write '\\{{' or one choice."
        )
    return ESCAPED_BRACE.sub(r"\1", text)


def _follow(node: Node, socket: Node, nodes: dict[Any, Node], starts: dict[Any, Link]) -> Link | None:
    """Follow a node's input past reroutes and bypassed nodes to the output that feeds it; None if nothing does."""
    wanted_type, link, seen = socket["type"], socket.get("link"), set()
    while link is not None:
        if link not in starts or starts[link][0] not in nodes:
            raise WorkflowFormatError(f"{_name(node)} has link {link}, which is missing: save the workflow again.")
        if link in seen:
            raise WorkflowFormatError(f"{_name(node)} feeds itself: break the circle of links.")
        seen.add(link)
        origin, output = starts[link]
        node = nodes[origin]
        if node.get("mode", 0) == BYPASSED:
            passed = _bypass_socket(node, output, wanted_type)
            link, wanted_type = (passed.get("link"), passed["type"]) if passed else (None, wanted_type)
        elif node["type"] == "Reroute":
            link = node["inputs"][0].get("link")
        else:
            return origin, output
    return None


def _bypass_socket(node: Node, output: int, wanted_type: str) -> Node | None:
    """Return the input that a bypassed node passes on: the one beside the output, else the first that fits."""
    sockets = node.get("inputs", [])
    output_type = node["outputs"][output]["type"]

    def fits(socket: Node) -> bool:
        return _types_meet(socket["type"], output_type) and _types_meet(socket["type"], wanted_type)

    beside = sockets[output] if output < len(sockets) else None
    if wanted_type in ("*", ""):
        return beside or (sockets[0] if sockets else None)
    if beside and fits(beside):
        return beside
    exact = [socket for socket in sockets if socket["type"] == wanted_type]
    return next(iter(exact + [socket for socket in sockets if fits(socket)]), None)


def _types_meet(one: Any, other: Any) -> bool:
    """Return whether two socket types may be linked: equal, a wildcard, or lists with a type in common."""
    one, other = str(one).lower(), str(other).lower()
    if one in ("*", "") or other in ("*", ""):
        return True
    return not set(one.split(",")).isdisjoint(other.split(","))


def _drop_links_to_missing_nodes(prompt: Prompt) -> None:
    for node in prompt.values():
        for name, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] not in prompt:
                del node["inputs"][name]


def _name(node: Node) -> str:
    return f"Node {node['id']} ({node.get('title') or node['type']})"
