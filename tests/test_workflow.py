"""Saved workflows as prompts: the same as the real frontend makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from tools.frontend import Frontend
from tools.host import ComfyServer
from tools.host_versions import read_template, what_is_not_read
from tools.workflow import WorkflowFormatError, override, to_prompt

# Templates that ComfyUI ships, of stock nodes only, chosen for what is in them.
TEMPLATES = (
    "default",  # a seed with its control
    "lora",  # a bypassed node
    "hiresfix_latent_workflow",  # two samplers
    "flux_kontext_dev_basic",  # uploads, several bypassed nodes
    "sdxl_simple_example",  # values from primitive nodes
    "hidream_e1_1",  # reroutes and primitive nodes
    "hunyuan_video_text_to_video",  # a muted node
)
INFO = {
    "Words": {
        "display_name": "Words",
        "input": {
            "required": {
                "text": ["STRING", {"multiline": True, "dynamicPrompts": True}],
                "seed": ["INT", {"default": 7}],
                "mode": [["first", "second"]],
            },
            "optional": {"strength": ["FLOAT", {"default": 0.5}], "picture": ["IMAGE"], "parts": ["COMBO", {}]},
        },
    }
}


def _template(*names: str) -> dict[str, Any]:
    """The first of the templates that this host ships."""
    for name in names:
        if (graph := read_template(name)) is not None:
            return graph
    pytest.skip(f"this ComfyUI ships no template {names[0]}")


def _words(**changes: Any) -> dict[str, Any]:
    """A workflow of one node, called 'Caption'."""
    node = {"id": 3, "type": "Words", "title": "Caption", "inputs": [], "widgets_values": ["a", 1, "fixed", "second"]}
    return {"nodes": [{**node, **changes}], "links": []}


def _inputs(**changes: Any) -> dict[str, Any]:
    return to_prompt(_words(**changes), INFO)["3"]["inputs"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_frontends(name: str, server: ComfyServer, frontend: Frontend) -> None:
    graph = _template(name)
    if reason := what_is_not_read(graph, server.object_info()):
        pytest.skip(f"the template as this ComfyUI ships it is not read by tools.workflow: {reason}")
    opened = frontend.open_workflow(graph)
    assert opened.missing_types == ()
    assert opened.node_count == len(graph["nodes"])
    mine = to_prompt(graph, server.object_info())
    # The server ignores titles, and the frontend translates them.
    without_titles = [{k: {**v, "_meta": None} for k, v in prompt.items()} for prompt in (mine, opened.prompt)]
    assert without_titles[0] == without_titles[1]


def test_the_frontend_reports_what_it_does_not_know(frontend: Frontend) -> None:
    graph = _template("default", "sdxl_simple_example")
    graph["nodes"][0]["type"] = "NoSuchNode"
    assert frontend.open_workflow(graph).missing_types == ("NoSuchNode",)


def test_the_frontend_opens_a_known_graph_without_errors(frontend: Frontend) -> None:
    opened = frontend.open_workflow(_template("default", "sdxl_simple_example"))
    assert opened.console_errors == ()
    assert opened.messages == ()


def test_the_frontends_repairs_are_reported(frontend: Frontend) -> None:
    graph = _template("default", "sdxl_simple_example")
    for node in graph["nodes"]:
        for output in node["outputs"]:
            output["links"] = []
    (message,) = frontend.open_workflow(graph).messages
    assert "Workflow Validation" in message
    assert frontend.open_workflow(_template("default", "sdxl_simple_example")).messages == ()


def test_values_are_taken_by_position_and_the_rest_from_defaults() -> None:
    assert _inputs() == {"text": "a", "seed": 1, "mode": "second", "strength": 0.5, "parts": None}
    assert _inputs(widgets_values=None)["mode"] == "first"


def test_values_saved_by_name_are_understood() -> None:
    assert _inputs(widgets_values={"seed": 9})["seed"] == 9


def test_a_list_is_wrapped_so_that_it_is_no_link() -> None:
    assert _inputs(widgets_values=["a", 1, "fixed", "second", 1.0, ["x", "y"]])["parts"] == {"__value__": ["x", "y"]}


def test_comments_are_stripped_and_braces_unescaped() -> None:
    text = "a /* not\nthis */dog // nor this\n\\{in\\} snow"
    assert _inputs(widgets_values=[text])["text"] == "a dog \n{in} snow"


def test_a_title_is_kept() -> None:
    assert to_prompt(_words(), INFO)["3"]["_meta"] == {"title": "Caption"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"widgets_values": ["{red|blue} dog"]}, r"Node 3 \(Caption\) has '{' in its text"),
        ({"type": "Strange"}, r"Node 3 \(Caption\) is of a class this server does not have"),
        (
            {"inputs": [{"name": "picture", "type": "IMAGE", "link": 8}]},
            r"Node 3 \(Caption\) has link 8, which is missing",
        ),
    ],
)
def test_what_cannot_be_translated_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WorkflowFormatError, match=sentence):
        to_prompt(_words(**changes), INFO)


def test_a_prompt_given_as_a_workflow_is_refused() -> None:
    with pytest.raises(WorkflowFormatError, match="save it with Save"):
        to_prompt({"3": {"class_type": "Words", "inputs": {}}}, INFO)


def test_override_changes_a_copy() -> None:
    prompt = to_prompt(_words(), INFO)
    changed = override(prompt, "Words", seed=99)
    assert (changed["3"]["inputs"]["seed"], prompt["3"]["inputs"]["seed"]) == (99, 1)
    with pytest.raises(KeyError, match="no node of class 'KSampler', only Words"):
        override(prompt, "KSampler", steps=1)
