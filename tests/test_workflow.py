"""Saved workflows as prompts: the same as the real frontend makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from tools.frontend import Frontend
from tools.host import ComfyServer
from tools.host_versions import read_template, what_is_not_read
from tools.workflow import WorkflowFormatError, override, to_prompt

# Templates that ComfyUI ships, of stock nodes only, by what is in them; of each, the first that the host ships and that
# is read.
TEMPLATES = {
    "a seed with its control": ("default", "sdxl_refiner_prompt_example"),
    "a bypassed node": ("lora", "image_qwen_image_controlnet_patch"),
    "two samplers": ("hiresfix_latent_workflow", "sdxl_refiner_prompt_example"),
    "uploads, several bypassed nodes": ("flux_kontext_dev_basic", "image_omnigen2_image_edit"),
    "values from primitive nodes": ("sdxl_simple_example",),
    "reroutes and primitive nodes": ("hidream_e1_1", "hidream_e1_full"),
    "a muted node": ("hunyuan_video_text_to_video",),
}
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


def _read_template(names: tuple[str, ...], object_info: dict[str, Any]) -> dict[str, Any]:
    """The first of the templates that this host ships and that tools.workflow reads."""
    reasons = []
    for name in names:
        graph = read_template(name)
        reason = "it is not shipped" if graph is None else what_is_not_read(graph, object_info)
        if graph is not None and not reason:
            return graph
        reasons.append(f"{name}: {reason}")
    pytest.skip(f"no template of this ComfyUI is read by tools.workflow ({'; '.join(reasons)})")


def _words(**changes: Any) -> dict[str, Any]:
    """A workflow of one node, called 'Caption'."""
    node = {"id": 3, "type": "Words", "title": "Caption", "inputs": [], "widgets_values": ["a", 1, "fixed", "second"]}
    return {"nodes": [{**node, **changes}], "links": []}


def _inputs(**changes: Any) -> dict[str, Any]:
    return to_prompt(_words(**changes), INFO)["3"]["inputs"]


@pytest.mark.parametrize("feature", TEMPLATES)
def test_the_prompt_is_the_frontends(feature: str, server: ComfyServer, page: Frontend) -> None:
    graph = _read_template(TEMPLATES[feature], server.object_info())
    opened = page.open_workflow(graph)
    assert opened.missing_types == ()
    assert opened.node_count == len(graph["nodes"])
    mine = to_prompt(graph, server.object_info())
    # The server ignores titles, and the frontend translates them.
    without_titles = [{k: {**v, "_meta": None} for k, v in prompt.items()} for prompt in (mine, opened.prompt)]
    assert without_titles[0] == without_titles[1]


def test_the_frontend_reports_what_it_does_not_know(page: Frontend) -> None:
    graph = _template("default", "sdxl_simple_example")
    graph["nodes"][0]["type"] = "NoSuchNode"
    assert page.open_workflow(graph).missing_types == ("NoSuchNode",)


def test_the_frontend_opens_a_known_graph_without_errors(page: Frontend) -> None:
    opened = page.open_workflow(_template("default", "sdxl_simple_example"))
    assert opened.console_errors == ()
    assert opened.messages == ()


def test_the_frontends_repairs_are_reported(page: Frontend) -> None:
    graph = _template("default", "sdxl_simple_example")
    for node in graph["nodes"]:
        for output in node["outputs"]:
            output["links"] = []
    message, *others = page.open_workflow(graph).messages
    assert "Workflow Validation" in message
    assert all("Workflow Links Fixed" in other for other in others)  # newer frontends also say how many
    assert page.open_workflow(_template("default", "sdxl_simple_example")).messages == ()


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
