"""The layout of saved workflows: what ships is laid out, and what the layout promises of any graph."""

from __future__ import annotations

import copy
import itertools
import json
import re

import pytest

from tools import layout
from tools.host import ROOT
from tools.layout import Box, lay_out, occupied, room

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LEAST_SCALE = 0.5  # letters of 14 pixels can still be read at 7


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def graph(request) -> dict:
    """Each workflow that ships."""
    return json.loads(request.param.read_text(encoding="utf-8"))


def frames(graph: dict) -> list[Box]:
    """The frames of a workflow's groups."""
    return [Box(*group["bounding"]) for group in graph["groups"]]


def test_what_ships_is_laid_out(graph):
    """`python -m tools.layout workflows/*.json` has nothing left to do."""
    assert lay_out(copy.deepcopy(graph)) == graph


def test_nothing_overlaps_even_when_it_has_grown(graph):
    rooms = [room(node) for node in graph["nodes"]]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(rooms, 2))
    assert not any(one.overlaps(other) for one, other in itertools.combinations(frames(graph), 2))


def test_every_node_is_in_one_numbered_group_and_the_note_is_in_none(graph):
    for node in graph["nodes"]:
        holders = [frame for frame in frames(graph) if frame.contains(room(node))]
        assert len(holders) == (0 if node["type"] == layout.NOTE else 1), node["type"]
    numbers, titles = zip(*(group["title"].split(" ", 1) for group in graph["groups"]), strict=True)
    assert numbers == tuple(str(number) for number in range(1, len(numbers) + 1))
    assert [title for title in titles if title in layout.TITLES] == [
        title for title in layout.TITLES if title in titles
    ]
    assert {"The model", "Your subject", "The prompt", "The picture"} <= set(titles)


def test_links_go_to_the_right_or_down(graph):
    boxes = {node["id"]: occupied(node) for node in graph["nodes"]}
    for _, source, _, target, _, kind in graph["links"]:
        one, other = boxes[source], boxes[target]
        assert one.right < other.x or (one.x == other.x and one.bottom < other.y), (source, target, kind)


def test_the_saved_view_shows_the_whole_at_a_readable_scale(graph):
    """In Nodes 2.0 of older frontends too, which enlarge the graph by a fifth from its upper left corner on."""
    boxes = [*frames(graph), *(room(node) for node in graph["nodes"])]
    scale, (x, y) = graph["extra"]["ds"]["scale"], graph["extra"]["ds"]["offset"]
    left, top, right, bottom = layout.FREE
    assert scale >= LEAST_SCALE
    for enlarged in (1.0, 1.2):
        assert min(box.x + x for box in boxes) * scale == pytest.approx(left, abs=1)
        assert min(box.y + y for box in boxes) * scale == pytest.approx(top, abs=1)
        assert max(box.right * enlarged + x for box in boxes) * scale <= right + 1
        assert max(box.bottom * enlarged + y for box in boxes) * scale <= bottom + 1


def test_the_note_is_three_lines_without_code(graph):
    (note,) = [node for node in graph["nodes"] if node["type"] == layout.NOTE]
    (text,) = note["widgets_values"]
    leads = [line.split(":** ")[0].removeprefix("**") for line in text.split("\n\n")]
    assert leads == ["What it does", "Change first", "Needs"]
    assert "`" not in text  # blue on blue in Nodes 2.0
    assert note["title"] != "How to use this"


def test_every_node_of_the_pack_has_a_group():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    assert {name for name in layout.GROUP_OF if name.startswith("BLIPDiffusion")} == {
        *re.findall(r'node_id="(\w+)"', sources)
    }


def chain(*classes: str) -> dict:
    """A graph of nodes that feed each other in a row."""
    nodes = [
        {"id": number, "type": name, "pos": [7, 7], "size": [1, 1], "inputs": [], "outputs": [], "widgets_values": []}
        for number, name in enumerate(classes, start=1)
    ]
    links = [[number, number, 0, number + 1, 0, "IMAGE"] for number in range(1, len(classes))]
    return {"nodes": nodes, "links": links, "groups": [], "extra": {"kept": 1}}


def columns_of(graph: dict) -> list[list[int]]:
    """The ids of the nodes by column, from left to right and from top to bottom."""
    places = sorted((node["pos"][0], node["pos"][1], node["id"]) for node in graph["nodes"])
    return [[number for *_, number in column] for _, column in itertools.groupby(places, key=lambda place: place[0])]


def test_ids_values_and_links_stay():
    graph = chain("LoadImage", "VAEEncode", "KSampler")
    graph["nodes"][0]["widgets_values"] = ["cat.jpg", "image"]
    before = copy.deepcopy(graph)
    after = lay_out(graph)
    assert graph == before
    for one, other in zip(before["nodes"], after["nodes"], strict=True):
        assert {**one, "pos": 0, "size": 0} == {**other, "pos": 0, "size": 0}
    assert after["links"] == before["links"]
    assert after["extra"]["kept"] == 1


def test_an_unknown_node_is_with_what_it_feeds_or_where_it_ends():
    graph = lay_out(chain("LoadImage", "SomethingNew", "VAEEncode", "KSampler", "ShowsSomething"))
    titles = {group["title"]: Box(*group["bounding"]) for group in graph["groups"]}
    holder = {
        node["id"]: title for node in graph["nodes"] for title, frame in titles.items() if frame.contains(room(node))
    }
    assert holder == {
        1: "1 The photograph",
        2: "1 The photograph",
        3: "1 The photograph",
        4: "2 The picture",
        5: "2 The picture",
    }


def test_a_graph_that_fits_goes_to_the_right_only():
    assert columns_of(lay_out(chain("LoadImage", "ImageScale", "VAEEncode", "KSampler"))) == [[1], [2], [3], [4]]


def test_columns_of_a_wide_graph_are_put_below_each_other_the_lowest_first():
    classes = ["LoadImage", *["ImageInvert"] * 7, "BLIPDiffusionSubjectEncode"]
    graph = lay_out(chain(*classes))
    columns = columns_of(graph)
    assert columns[0] == [1]  # the highest stands alone
    assert [number for column in columns for number in column] == list(range(1, 10))
    assert len(columns) < len(classes)
    assert graph["extra"]["ds"]["scale"] >= layout.READABLE


def test_the_order_of_nodes_in_the_file_does_not_matter_within_what_links_decide():
    graph = chain("LoadImage", "BLIPDiffusionSubjectEncode", "BLIPDiffusionPromptCompose", "KSampler", "SaveImage")
    turned = {**graph, "nodes": graph["nodes"][::-1]}
    assert columns_of(lay_out(turned)) == columns_of(lay_out(graph))
    assert lay_out(turned)["groups"] == lay_out(graph)["groups"]


@pytest.mark.parametrize(
    ("node", "least"),
    [
        ({"type": "VAEDecode", "inputs": [{}, {}], "outputs": [{}], "widgets_values": []}, 55),
        ({"type": "CLIPTextEncode", "inputs": [{}], "outputs": [{}], "widgets_values": ["a"]}, 104),
        ({"type": "KSampler", "inputs": [{}] * 4, "outputs": [{}], "widgets_values": [0] * 7}, 265),
        ({"type": "BLIPDiffusionEditMask", "inputs": [{}], "outputs": [{}], "widgets_values": []}, 58),
    ],
)
def test_heights_are_enough_for_what_pages_measured(node, least):
    """The largest of 0.3.75 and 0.33.0, classic and Nodes 2.0, in pixels without the title."""
    assert least <= layout.height(node, 300) <= least + 50


def test_the_command_writes_the_same_file_again(tmp_path, capsys):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(chain("LoadImage", "VAEEncode", "KSampler")))
    assert layout.main([str(path)]) == 0
    once = path.read_bytes()
    assert layout.main([str(path)]) == 0
    assert path.read_bytes() == once
    assert "3 nodes" in capsys.readouterr().out
