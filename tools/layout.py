"""Lay saved workflows out: titled groups from left to right, room under every node that grows, a view that shows all.

``python -m tools.layout workflows/*.json`` rewrites the files. Only positions, sizes, groups and the saved view change;
ids, values and links stay. The same graph always gets the same layout.

A column of nodes is a node's rank in its group: as far right as the longest chain of links before it. While the whole
does not fit a window at a readable scale, neighbouring columns of a group are put below each other, the lowest first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip_qformer.atomic import atomic_file

Graph = dict[str, Any]
"""A workflow as the frontend saves it."""
Node = dict[str, Any]
"""One of its nodes."""

MODEL, SUBJECT, PROMPT, EDIT, PICTURE = range(5)
TITLES = ("The model", "Your subject", "The prompt", "The edit", "The picture")
COLORS = ("#3f789e", "#8A8", "#b58b2a", "#b06634", "#88A")  # the frontend's own group colors

#: Groups of node classes. A node of another class goes to the group of the first node that it feeds.
GROUPS = {
    MODEL: (
        "BLIPDiffusionControlNetLoader",
        "BLIPDiffusionDownload",
        "BLIPDiffusionLoader",
        "BLIPDiffusionQFormerLoader",
        "CLIPMergeAdd",
        "CLIPMergeSubtract",
        "CheckpointLoaderSimple",
        "ControlNetLoader",
        "LoraLoader",
        "LoraLoaderModelOnly",
        "ModelMergeAdd",
        "ModelMergeSubtract",
        "ModelSamplingDiscrete",
    ),
    SUBJECT: (
        "BLIPDiffusionSubjectEncode",
        "BLIPDiffusionSubjectFinetune",
        "BLIPDiffusionSubjectInterpolate",
        "BLIPDiffusionSubjectLoad",
        "BLIPDiffusionSubjectOnBackground",
        "BLIPDiffusionSubjectSave",
        "BLIPDiffusionSubjectTrajectory",
        "BLIPDiffusionTunedSubjectLoader",
        "SaveLoRA",
    ),
    PROMPT: (
        "BLIPDiffusionPromptCompose",
        "BLIPDiffusionSubjectRegions",
        "CLIPTextEncode",
        "ConditioningCombine",
        "ConditioningSetAreaPercentage",
        "ConditioningSetMask",
    ),
    EDIT: (
        "BLIPDiffusionAttentionRecord",
        "BLIPDiffusionAttentionReweight",
        "BLIPDiffusionDDIMInversion",
        "BLIPDiffusionPromptToPrompt",
        "ControlNetApplyAdvanced",
        "SetLatentNoiseMask",
        "VAEEncode",
    ),
    PICTURE: (
        "BLIPDiffusionAttentionMap",
        "BLIPDiffusionEditMask",
        "BLIPDiffusionSubjectFidelity",
        "BLIPDiffusionSubjectGrid",
        "KSampler",
        "KSamplerAdvanced",
        "SaveImage",
        "VAEDecode",
    ),
}
GROUP_OF = {node_class: group for group, classes in GROUPS.items() for node_class in classes}
NOTE = "MarkdownNote"

#: Widths of node classes; all nodes of a column get the widest one's.
WIDTHS = {
    "BLIPDiffusionPromptCompose": 330,
    "BLIPDiffusionPromptToPrompt": 330,
    "BLIPDiffusionSubjectFinetune": 330,
    "BLIPDiffusionSubjectRegions": 330,
    "SaveImage": 310,
}
WIDTH = 290

#: Number of text boxes with several lines, by node class.
TEXT_BOXES = {
    "BLIPDiffusionAttentionRecord": 1,
    "BLIPDiffusionAttentionReweight": 2,
    "BLIPDiffusionPromptCompose": 1,
    "BLIPDiffusionPromptToPrompt": 2,
    "BLIPDiffusionSubjectFinetune": 1,
    "BLIPDiffusionSubjectGrid": 1,
    "BLIPDiffusionSubjectRegions": 1,
    "CLIPTextEncode": 1,
}
#: Height of the image that a node shows in its saved size.
IMAGES = {"BLIPDiffusionSubjectLoad": 230, "LoadImage": 220, "MaskPreview": 290, "PreviewImage": 290, "SaveImage": 310}
#: Height by which a node grows while it runs, when it shows what it is sampling.
GROWTH = {"BLIPDiffusionSubjectFinetune": 300, "KSampler": 300, "KSamplerAdvanced": 300}

# Heights in pixels that are enough in both renderers of all supported frontends; tests/test_workflows.py measures them.
TITLE = 30  # above a node's position
FRAME, SLOT, WIDGET, TEXT_BOX = 38, 20, 25, 56
ADVANCED = 11  # more for each widget of a node that shows its advanced ones: the sliders among them are higher
BADGE = 34  # the name of the pack, and the button for advanced inputs
BADGED = ("BLIPDiffusion", "SaveLoRA")
NOTE_WIDTH, NOTE_LINE, NOTE_CHARACTER = 340, 22, 7.5

WINDOW = (1920, 1080)
#: What the page leaves of the window for the graph: left, top, right and bottom edge in pixels.
FREE = (80, 115, 1890, 1030)
#: Nodes 2.0 of older frontends shows a graph larger by this, from its upper left corner on.
ENLARGED = 1.2
READABLE = 0.605  # below 0.572 the page of older frontends leaves texts out
GAP_X, GAP_Y = 40, 40  # between nodes; the lower edge of a node with an error hangs out by about 30
PADDING = 15  # between a group's frame and its nodes
GROUP_TITLE = 40
GROUP_GAP = 30
GRID = 10


@dataclass(frozen=True)
class Box:
    """A rectangle on the canvas.

    Attributes:
        x: Left edge.
        y: Upper edge.
        width: Width.
        height: Height.
    """

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Lower edge."""
        return self.y + self.height

    def overlaps(self, other: Box) -> bool:
        """Return whether both have a point inside in common."""
        return self.x < other.right and other.x < self.right and self.y < other.bottom and other.y < self.bottom

    def contains(self, other: Box) -> bool:
        """Return whether the other lies inside."""
        return self.x <= other.x and other.right <= self.right and self.y <= other.y and other.bottom <= self.bottom


Columns = list[list[Node]]
"""Nodes of a group: columns from left to right, each from top to bottom."""


def lay_out(graph: Graph) -> Graph:
    """Return a copy of a workflow that is laid out.

    Args:
        graph: Workflow as the frontend saves it.
    """
    nodes = [dict(node) for node in graph["nodes"]]
    groups = _fold(_split_into_groups(nodes, graph["links"]))
    notes = [node for node in nodes if node["type"] == NOTE]
    frames = _place(notes, groups)
    return {
        **graph,
        "nodes": nodes,
        "groups": [
            {
                "id": number,
                "title": f"{number} {_title(group, groups[group])}",
                "bounding": [frame.x, frame.y, frame.width, frame.height],
                "color": COLORS[group],
                "font_size": 24,
                "flags": {},
            }
            for number, (group, frame) in enumerate(frames.items(), start=1)
        ],
        "extra": {**graph.get("extra", {}), "ds": _fitted_view([*map(occupied, notes), *frames.values()])},
    }


def occupied(node: Node) -> Box:
    """Return what a node takes up with its title, before it grows.

    Args:
        node: Node that is laid out.
    """
    (x, y), (width, height) = node["pos"], node["size"]
    return Box(x, y - TITLE, width, height + TITLE)


def room(node: Node) -> Box:
    """Return what a node takes up at most: what it grows by is kept free too.

    Args:
        node: Node that is laid out.
    """
    box = occupied(node)
    return Box(box.x, box.y, box.width, box.height + GROWTH.get(node["type"], 0))


def height(node: Node, width: float) -> int:
    """Return the height of a node without its title, in pixels, that is enough for what is in it.

    Args:
        node: Node as it is saved.
        width: Its width.
    """
    if node["type"] == NOTE:
        return _note_height(node["widgets_values"][0], width)
    slots = max(
        sum("widget" not in socket for socket in node.get("inputs", [])),
        len(node.get("outputs", [])),
    )
    boxes = TEXT_BOXES.get(node["type"], 0)
    widgets = max(len(node.get("widgets_values", [])), sum("widget" in socket for socket in node.get("inputs", [])))
    widget = WIDGET + ADVANCED * bool(node.get("showAdvanced"))
    frame = FRAME + BADGE * node["type"].startswith(BADGED) + IMAGES.get(node["type"], 0)
    return _on_grid(frame + SLOT * slots + widget * (widgets - boxes) + TEXT_BOX * boxes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Lay out the files that the command line names; return the exit code."""
    for path in map(Path, sys.argv[1:] if arguments is None else arguments):
        graph = lay_out(json.loads(path.read_text(encoding="utf-8")))
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"Laid out {path}: {len(graph['nodes'])} nodes, view at {graph['extra']['ds']['scale']:.0%}.")
    return 0


def _split_into_groups(nodes: Sequence[Node], links: Iterable[Sequence[Any]]) -> dict[int, Columns]:
    """Return the columns of each group that has nodes: a node is right of all in its group that it depends on."""
    pairs = [(link[1], link[3]) for link in links]
    group_of = _find_groups(nodes, pairs)
    groups: dict[int, Columns] = {}
    for group in sorted({*group_of.values()}):
        members = [node for node in nodes if group_of.get(node["id"]) == group]
        members.sort(key=lambda node: node["type"] == "CLIPTextEncode")  # the negative prompt comes last
        ids = {node["id"] for node in members}
        inside = [pair for pair in pairs if ids.issuperset(pair)]
        ranks = _ranks(ids, inside)
        linked = {node for pair in inside for node in pair}
        columns: Columns = [[] for _ in range(max(ranks.values()) + 1)]
        for node in members:
            if node["id"] in linked:
                columns[ranks[node["id"]]].append(node)
        for node in members:
            if node["id"] not in linked:
                min(columns, key=_column_height).append(node)
        groups[group] = columns
    return groups


def _find_groups(nodes: Sequence[Node], pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the group of each node by its id; a note has none."""
    known = {node["id"]: GROUP_OF[node["type"]] for node in nodes if node["type"] in GROUP_OF}
    unknown = [node["id"] for node in nodes if node["id"] not in known and node["type"] != NOTE]
    pairs = list(pairs)
    while unknown:
        found = {}
        for node in unknown:
            fed = [known[target] for source, target in pairs if source == node and target in known]
            feeding = [known[source] for source, target in pairs if target == node and source in known]
            is_last = all(source != node for source, _ in pairs)
            if fed or (is_last and feeding):
                found[node] = min(fed) if fed else max(feeding)
        known |= found or dict.fromkeys(unknown, PICTURE)
        unknown = [node for node in unknown if node not in known]
    return known


def _ranks(ids: Iterable[int], inside: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the number of links in the longest chain before each node."""
    ids = set(ids)
    ranks = dict.fromkeys(ids, 0)
    for _ in ids:  # no chain is longer
        for source, target in inside:
            ranks[target] = max(ranks[target], ranks[source] + 1)
    return ranks


def _fold(groups: Mapping[int, Columns]) -> dict[int, Columns]:
    """Put neighbouring columns below each other, those that get least high first, until the whole is readable."""
    folded = {group: list(columns) for group, columns in groups.items()}
    while (scale := _scale(folded)) < READABLE:
        choices = []
        for group, columns in folded.items():
            for left in range(len(columns) - 1):
                merged = [*columns[:left], [*columns[left], *columns[left + 1]], *columns[left + 2 :]]
                if _scale({**folded, group: merged}) > scale:
                    choices.append((_column_height(merged[left]), group, left, merged))
        if not choices:
            break
        _, group, _, merged = min(choices, key=lambda choice: choice[:3])
        folded[group] = merged
    return folded


def _scale(groups: Mapping[int, Columns]) -> float:
    """Return the scale at which the groups fit the window."""
    widths = [_group_width(columns) for columns in groups.values()]
    width = max(widths[0], NOTE_WIDTH) + sum(widths[1:]) + GROUP_GAP * (len(widths) - 1)
    height = max(max(map(_column_height, columns)) for columns in groups.values()) + GROUP_TITLE + PADDING
    return _fit(width, height)


def _fit(width: float, height: float) -> float:
    """Return the largest scale, 1 at most, at which a rectangle fits what the page leaves of the window."""
    left, top, right, bottom = FREE
    return min((right - left) / (ENLARGED * width), (bottom - top) / (ENLARGED * height), 1.0)


def _column_width(column: Sequence[Node]) -> int:
    return max((WIDTHS.get(node["type"], WIDTH) for node in column), default=0)


def _group_width(columns: Columns) -> int:
    return sum(map(_column_width, columns)) + GAP_X * (len(columns) - 1) + 2 * PADDING


def _column_height(column: Sequence[Node]) -> int:
    width = _column_width(column)
    return sum(_height_with_room(node, width) for node in column) + GAP_Y * max(len(column) - 1, 0)


def _height_with_room(node: Node, width: float) -> int:
    return TITLE + height(node, width) + GROWTH.get(node["type"], 0)


def _place(notes: Sequence[Node], groups: Mapping[int, Columns]) -> dict[int, Box]:
    """Set the positions and sizes of all nodes; return the frame of each group.

    The notes are above the first group.
    """
    frames: dict[int, Box] = {}
    x = y = 0
    for group, columns in groups.items():
        width = _group_width(columns)
        y = 0
        if not frames:
            width = max(width, NOTE_WIDTH) if notes else width
            for note in notes:
                _set(note, x, y, width)
                y += _height_with_room(note, width) + GROUP_GAP
        bottom = y
        column_x = x + PADDING
        for column in columns:
            node_y, column_width = y + GROUP_TITLE, _column_width(column)
            if len(columns) == 1:
                column_width = width - 2 * PADDING
            for node in column:
                _set(node, column_x, node_y, column_width)
                node_y += _height_with_room(node, column_width) + GAP_Y
            bottom = max(bottom, node_y - GAP_Y)
            column_x += column_width + GAP_X
        frames[group] = Box(x, y, width, bottom + PADDING - y)
        x += width + GROUP_GAP
    return frames


def _set(node: Node, x: int, top: int, width: int) -> None:
    node["pos"], node["size"] = [x, top + TITLE], [width, height(node, width)]


def _fitted_view(boxes: Sequence[Box]) -> dict[str, Any]:
    """Return the saved view that shows all of the rectangles from the upper left corner on."""
    left, top = min(box.x for box in boxes), min(box.y for box in boxes)
    scale = _fit(max(box.right for box in boxes) - left, max(box.bottom for box in boxes) - top)
    scale = int(scale * 1000) / 1000
    return {"scale": scale, "offset": [round(FREE[0] / scale - left, 3), round(FREE[1] / scale - top, 3)]}


def _title(group: int, columns: Columns) -> str:
    """Return a group's title; what the fourth one is for depends on what is in it."""
    if group != EDIT:
        return TITLES[group]
    classes = {node["type"] for column in columns for node in column}
    if any(name.startswith("ControlNetApply") for name in classes):
        return "The shape"
    return TITLES[EDIT] if any(name.startswith("BLIPDiffusion") for name in classes) else "The photograph"


def _note_height(text: str, width: float) -> int:
    """Return the height of a note: its lines, wrapped, and the spaces between paragraphs."""
    characters = (width - 50) // NOTE_CHARACTER
    lines = sum(1 + len(line) // characters if line else 0.5 for line in text.split("\n"))
    return _on_grid(40 + NOTE_LINE * lines)


def _on_grid(value: float) -> int:
    """Return the next multiple of the grid's width."""
    return -(-int(value + 0.999) // GRID) * GRID


if __name__ == "__main__":
    raise SystemExit(main())
