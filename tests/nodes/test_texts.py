"""What an artist reads: every node, input and output says what it is, and has a help page that names them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.host import ROOT

#: Ids that saved graphs and other programs rely on; they never change.
NODES = {
    "BLIPDiffusionLoader": "Load BLIP-Diffusion",
    "BLIPDiffusionQFormerLoader": "Load BLIP-2 Q-Former",
    "BLIPDiffusionControlNetLoader": "Load BLIP-Diffusion ControlNet",
    "BLIPDiffusionTunedSubjectLoader": "Load Tuned Subject",
    "BLIPDiffusionSubjectEncode": "BLIP-2 Subject Encode",
    "BLIPDiffusionPromptCompose": "Subject Prompt Compose",
    "BLIPDiffusionSubjectInterpolate": "Subject Interpolate",
    "BLIPDiffusionSubjectTrajectory": "Subject Trajectory",
    "BLIPDiffusionSubjectGrid": "Subject Grid",
    "BLIPDiffusionSubjectSave": "Save Subject",
    "BLIPDiffusionSubjectLoad": "Load Subject",
    "BLIPDiffusionSubjectOnBackground": "Subject on Background",
    "BLIPDiffusionAttentionReweight": "Attention Re-weight Edit",
    "BLIPDiffusionPromptToPrompt": "Prompt-to-Prompt Edit",
    "BLIPDiffusionEditMask": "Edit Mask",
    "BLIPDiffusionSubjectRegions": "Subject Regions",
    "BLIPDiffusionDDIMInversion": "DDIM Inversion",
    "BLIPDiffusionAttentionRecord": "Record Attention",
    "BLIPDiffusionAttentionMap": "Subject Attention Map",
    "BLIPDiffusionSubjectFinetune": "Subject Fine-tune",
    "BLIPDiffusionSubjectFidelity": "Subject Fidelity",
    "BLIPDiffusionDownload": "Download BLIP-Diffusion",
}

#: Saved graphs hold widgets by position: new ones go to the end.
WIDGETS = {
    "BLIPDiffusionLoader": ["checkpoint"],
    "BLIPDiffusionQFormerLoader": ["checkpoint"],
    "BLIPDiffusionControlNetLoader": ["checkpoint"],
    "BLIPDiffusionTunedSubjectLoader": ["checkpoint", "subject_word"],
    "BLIPDiffusionSubjectEncode": ["subject_word", "average_batch", "preprocessing", "view_weights"],
    "BLIPDiffusionPromptCompose": [
        "prompt",
        "target_subject",
        "prompt_strength",
        "repetitions",
        "overflow",
        "subject_strength",
    ],
    "BLIPDiffusionSubjectInterpolate": ["x", "y", "mode", "weights", "word"],
    "BLIPDiffusionSubjectTrajectory": ["steps", "mode", "word", "steps_at_once"],
    "BLIPDiffusionSubjectGrid": ["columns", "labels", "longest_side"],
    "BLIPDiffusionSubjectSave": ["name", "overwrite", "save_preview"],
    "BLIPDiffusionSubjectLoad": ["subject_file", "subject_word"],
    "BLIPDiffusionSubjectOnBackground": [
        "subject_word",
        "scale",
        "x",
        "y",
        "output_size",
        "soften_edge",
        "segmentation_model",
        "background_below",
        "subject_above",
        "matting_size",
    ],
    "BLIPDiffusionAttentionReweight": ["weights", "start", "end", "text"],
    "BLIPDiffusionPromptToPrompt": [
        "cross_end",
        "self_end",
        "weights",
        "blend_words",
        "source_blend_words",
        "blend_threshold",
        "cross_start",
        "self_start",
        "word_steps",
        "source_unguided",
        "source_text",
        "edited_text",
        "blend_regions",
    ],
    "BLIPDiffusionEditMask": [],
    "BLIPDiffusionSubjectRegions": ["boxes", "strengths", "feathers", "base_share", "start", "end"],
    "BLIPDiffusionDDIMInversion": ["steps", "refinements"],
    "BLIPDiffusionAttentionRecord": ["text"],
    "BLIPDiffusionAttentionMap": ["words", "strength"],
    "BLIPDiffusionSubjectFinetune": [
        "subject_word",
        "steps",
        "trains",
        "learning_rate",
        "seed",
        "batch_size",
        "resolution",
        "rank",
        "look_every",
        "look_prompts",
        "gradient_checkpointing",
        "mirror",
    ],
    "BLIPDiffusionSubjectFidelity": ["prompt", "preprocessing"],
    "BLIPDiffusionDownload": ["what", "keep_original"],
}
MENUS = {"BLIP-Diffusion", "BLIP-Diffusion/setup"}
SOCKETS = {
    "MODEL",
    "CLIP",
    "VAE",
    "IMAGE",
    "LATENT",
    "MASK",
    "CONDITIONING",
    "BLIP_SUBJECT",
    "BLIP2_QFORMER",
    "BLIP_ATTENTION_RECORD",
}


@pytest.fixture(scope="module")
def info(server) -> dict:
    """What the server tells the frontend about our nodes."""
    return {name: node for name, node in server.object_info().items() if node["category"] in MENUS}


def inputs_of(node: dict) -> dict[str, list]:
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def test_ids_and_names(info):
    assert {name: node["display_name"] for name, node in info.items()} == NODES


@pytest.mark.parametrize("name", NODES)
def test_every_input_and_output_has_a_tooltip(info, name):
    assert info[name]["description"]
    assert all(options.get("tooltip") for _, options in inputs_of(info[name]).values())
    assert all(info[name]["output_tooltips"])


#: Those that a first graph needs, and the one that teaches the model.
ESSENTIALS = {
    "BLIPDiffusionLoader",
    "BLIPDiffusionSubjectEncode",
    "BLIPDiffusionPromptCompose",
    "BLIPDiffusionSubjectFinetune",
}


#: What people call it elsewhere -> the nodes that fit, one of which comes first among ours.
FOUND_BY = {
    "encode subject": {"BLIPDiffusionSubjectEncode"},
    "image prompt": {"BLIPDiffusionSubjectEncode", "BLIPDiffusionPromptCompose"},
    "ip-adapter": {"BLIPDiffusionSubjectEncode"},
    "face swap": {"BLIPDiffusionSubjectEncode"},
    "p2p": {"BLIPDiffusionPromptToPrompt"},
    "prompt to prompt": {"BLIPDiffusionPromptToPrompt"},
    "dreambooth": {"BLIPDiffusionSubjectFinetune"},
    "lora training": {"BLIPDiffusionSubjectFinetune"},
    "textual inversion": {"BLIPDiffusionSubjectSave", "BLIPDiffusionSubjectLoad"},
    "mix": {"BLIPDiffusionSubjectInterpolate"},
    "morph": {"BLIPDiffusionSubjectTrajectory"},
    "cut out": {"BLIPDiffusionSubjectOnBackground"},
    "regional prompt": {"BLIPDiffusionSubjectRegions"},
    "heatmap": {"BLIPDiffusionAttentionMap"},
}


@pytest.mark.parametrize("field", ["search_aliases", "essentials_category"])
def test_a_field_is_left_out_where_the_host_does_not_know_it(host, monkeypatch, field):
    versions = host.module("nodes.host.versions")
    known = {"search_aliases": ["heatmap"], "essentials_category": "group"}
    monkeypatch.setattr(versions, "SCHEMA_FIELDS", frozenset(known))
    assert versions.newer_fields(["heatmap"], "group") == known
    monkeypatch.setattr(versions, "SCHEMA_FIELDS", frozenset(known) - {field})
    assert versions.newer_fields(["heatmap"], "group") == {key: known[key] for key in known if key != field}


def test_nodes_are_found_by_other_words_where_the_host_knows_them(host, info):
    known = host.module("nodes.host.versions").SCHEMA_FIELDS
    if "search_aliases" in known:
        assert [name for name in NODES if len(info[name]["search_aliases"]) < 2] == []
        for word, names in FOUND_BY.items():
            assert all(word in info[name]["search_aliases"] for name in names), word
    else:
        assert not any(node.get("search_aliases") for node in info.values())
    if "essentials_category" in known:
        assert {name for name in NODES if info[name].get("essentials_category") == "BLIP-Diffusion"} == ESSENTIALS


def test_the_page_finds_nodes_by_their_names_and_by_other_words(host, frontend):
    for text in ("BLIP-2 Subject Encode", "blip-2 subject", "subject encode"):
        found, by_alias = frontend.search_nodes(text)
        assert found[0] == "BLIPDiffusionSubjectEncode", text
    # The page ranks a name that begins with the text before one that contains it, so that "Subject Grid" comes first.
    assert "BLIPDiffusionSubjectEncode" in frontend.search_nodes("subject")[0]
    if not by_alias or "search_aliases" not in host.module("nodes.host.versions").SCHEMA_FIELDS:
        pytest.skip("this ComfyUI or its frontend does not know other words for a node")
    ours = {word: [name for name in frontend.search_nodes(word)[0] if name in NODES] for word in FOUND_BY}
    assert {word: found for word, found in ours.items() if not found or found[0] not in FOUND_BY[word]} == {}


@pytest.mark.parametrize("name", NODES)
def test_widgets_keep_their_order(info, name):
    assert [key for key, (kind, _) in inputs_of(info[name]).items() if kind not in SOCKETS] == WIDGETS[name]


@pytest.mark.parametrize("name", NODES)
def test_rare_widgets_are_marked_advanced_and_stand_last(info, name):
    flags = [bool(inputs_of(info[name])[widget][1].get("advanced")) for widget in WIDGETS[name]]
    assert flags == sorted(flags)


@pytest.mark.parametrize("name", NODES)
def test_help_page_is_served_and_names_everything(info, frontend, name):
    page = frontend.node_help(name)
    assert page.startswith(f"# {NODES[name]}\n")
    assert [each for each in [*inputs_of(info[name]), *info[name]["output_name"]] if f"| {each} " not in page] == []


def test_every_id_is_a_literal_for_the_managers_scanner():
    sources = "\n".join(path.read_text() for path in Path(ROOT / "nodes").glob("*.py"))
    assert set(re.findall(r'node_id="(\w+)"', sources)) == set(NODES)
