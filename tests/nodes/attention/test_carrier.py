"""What brings edits and recordings to a sampling run: a hook of the conditioning, or the MODEL wire, or both."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

from tests.nodes.attention.graphs import (
    SOURCE,
    close,
    counted,
    differ,
    empty,
    inserted,
    plain,
    reweight,
    sample,
    under_controlnet,
    under_lora,
    under_two_loras,
)
from tests.nodes.test_prompt import compose
from tools.host_versions import copies_dynamic_models


def dynamic(model, monkeypatch):
    """A MODEL that says its memory is dynamic, and the list of static copies that the host asked it for.

    A host too old to ask is made to do so, as newer ones do when a guider gets its conditionings.
    """
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

    delegates = []

    class Dynamic(ModelPatcher):
        def is_dynamic(self):
            return True

        def loaded_ram_size(self):
            return 0

        def get_non_dynamic_delegate(self):
            static = self.clone()
            static.__class__ = ModelPatcher  # the real one reads the checkpoint's file again
            delegates.append(static)
            return static

    set_conds = CFGGuider.inner_set_conds

    def copy_for_hooks(guider, conds):
        for conditioning in conds.values():
            if isinstance(guider.model_patcher, Dynamic) and any("hooks" in options for _, options in conditioning):
                guider.model_patcher = guider.model_patcher.get_non_dynamic_delegate()
        set_conds(guider, conds)

    if not copies_dynamic_models():
        monkeypatch.setattr(CFGGuider, "inner_set_conds", copy_for_hooks)
    model = model.clone()
    model.__class__ = Dynamic
    return model, delegates


def run_node(host, small, node, **inputs):
    """Conditioning, LATENT (empty where the node has none), record and MODEL of a node that edits or records."""
    source, edited = inserted(host, small)
    if node == "reweight":
        conditioning, model = host.run(
            "BLIPDiffusionAttentionReweight", conditioning=edited, weights="snow:4, <subject>:0.3", **inputs
        )
        return SimpleNamespace(conditioning=conditioning, latent=empty(), model=model, record=None)
    if node == "record":
        conditioning, record, model = host.run("BLIPDiffusionAttentionRecord", conditioning=edited, **inputs)
        return SimpleNamespace(conditioning=conditioning, latent=empty(), model=model, record=record)
    if node == "regions":
        halves = {"region_1": edited, "boxes": "0, 0, 0.5, 1"}
        conditioning, _, model = host.run("BLIPDiffusionSubjectRegions", scene=source, **halves, **inputs)
        return SimpleNamespace(conditioning=conditioning, latent=empty(), model=model, record=None)
    settings = {"blend_words": "<subject>", "blend_threshold": 0.7} if node == "local blend" else {}
    texts = {"clip": small.clip, "source_text": SOURCE}
    conditioning, latent, model = host.run(
        "BLIPDiffusionPromptToPrompt", source=source, edited=edited, latent=empty(), **texts, **settings, **inputs
    )
    return SimpleNamespace(conditioning=conditioning, latent=latent, model=model, record=None)


NODES = ["reweight", "prompt to prompt", "local blend", "record", "regions"]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("graph", [plain, under_controlnet, under_lora, under_two_loras])
def test_the_wire_draws_the_same_picture(host, small, node, graph):
    """To the last bit, in as many calls of as many rows, and the model that came in is as it was."""
    pictures, calls = [], []
    for inputs in ({}, {"model": small.model}):
        found = run_node(host, small, node, **inputs)
        positive, negative, _ = graph(host, small, found.conditioning)
        model, rows = counted(found.model if inputs else small.model)
        pictures.append(sample(host, small, positive, found.latent, model=model, negative=negative))
        calls.append(rows)
    assert torch.equal(*pictures)
    assert calls[0] == calls[1]
    assert not small.model.wrappers.get("outer_sample")


@pytest.mark.parametrize("node", NODES)
def test_a_dynamic_model_is_not_copied_with_the_wire(host, small, monkeypatch, node):
    """Without the wire the host copies it once a run, because the conditioning has hooks."""
    model, delegates = dynamic(small.model, monkeypatch)
    found = run_node(host, small, node, model=model)
    assert all("hooks" not in options for _, options in found.conditioning)
    wired = sample(host, small, found.conditioning, found.latent, model=found.model)
    assert len(delegates) == 0
    found = run_node(host, small, node)
    assert all("hooks" in options for _, options in found.conditioning)
    hooked = sample(host, small, found.conditioning, found.latent, model=model)
    assert len(delegates) == 1
    assert torch.equal(wired, hooked)


@pytest.mark.parametrize("first", ["wired", "hooked"])
@pytest.mark.parametrize("second", ["wired", "hooked"])
def test_two_edits_act_once_each(host, small, first, second):
    """Whichever way each of them comes: weights of 2 and 3 are one of 6, and not 36."""
    positive, _ = compose(host, small, small.subject)
    expected = sample(host, small, reweight(host, positive, "snow:6"))
    model, conditioning = small.model, positive
    for way, weights in ((first, "snow:2"), (second, "snow:3")):
        inputs = {"model": model} if way == "wired" else {}
        conditioning, wired = host.run(
            "BLIPDiffusionAttentionReweight", conditioning=conditioning, weights=weights, **inputs
        )
        model = wired if inputs else model
    close(sample(host, small, conditioning, model=model), expected, tolerance=1e-5)
    differ(sample(host, small, positive), expected)
    assert sum(map(len, model.wrappers.get("outer_sample", {}).values())) <= 1


@pytest.mark.parametrize("edit", ["wired", "hooked"])
@pytest.mark.parametrize("watch", ["wired", "hooked"])
def test_an_edit_and_a_record_act_once_each(host, small, edit, watch):
    """The record holds what it holds when both come by hooks: nothing is added up twice."""
    positive, _ = compose(host, small, small.subject)
    expected = sample(host, small, reweight(host, positive, "snow:4"))
    hooked, expected_record, _ = host.run(
        "BLIPDiffusionAttentionRecord", conditioning=reweight(host, positive, "snow:4")
    )
    sample(host, small, hooked)
    model, conditioning = small.model, positive
    conditioning, wired = host.run(
        "BLIPDiffusionAttentionReweight",
        conditioning=conditioning,
        weights="snow:4",
        **({"model": model} if edit == "wired" else {}),
    )
    model = wired if edit == "wired" else model
    conditioning, record, wired = host.run(
        "BLIPDiffusionAttentionRecord",
        conditioning=conditioning,
        **({"model": model} if watch == "wired" else {}),
    )
    model = wired if watch == "wired" else model
    assert torch.equal(sample(host, small, conditioning, model=model), expected)
    image = torch.zeros(1, 64, 96, 3)
    shown, expected_maps = (
        host.run("BLIPDiffusionAttentionMap", attention=each, image=image)[1] for each in (record, expected_record)
    )
    assert torch.equal(shown, expected_maps)
    assert shown.std() > 0


def test_a_wired_edit_takes_the_hook_of_the_edit_before_it_off(host, small, monkeypatch):
    """So that one wire is enough, at the last of several edits."""
    model, delegates = dynamic(small.model, monkeypatch)
    positive, _ = compose(host, small, small.subject)
    louder = reweight(host, positive, "snow:2")
    conditioning, wired = host.run(
        "BLIPDiffusionAttentionReweight", conditioning=louder, weights="<subject>:0.3", model=model
    )
    expected = sample(host, small, reweight(host, louder, "<subject>:0.3"))
    assert torch.equal(sample(host, small, conditioning, model=wired), expected)
    assert delegates == []


@pytest.mark.parametrize("node", NODES)
def test_a_sampler_without_the_wired_model_is_refused(host, small, node):
    """The edit would be lost without a word."""
    found = run_node(host, small, node, model=small.model)
    with pytest.raises(ValueError, match="connect that node's model output to the sampler"):
        sample(host, small, found.conditioning, found.latent)


def test_a_model_with_the_wire_draws_other_prompts_as_ever(host, small):
    """Also where prompts have hooks of others."""
    wired = run_node(host, small, "reweight", model=small.model).model
    wired = run_node(host, small, "record", model=wired).model
    for graph in (plain, under_two_loras):
        positive, negative, model = graph(host, small, inserted(host, small)[1])
        expected = sample(host, small, positive, model=model, negative=negative)
        assert torch.equal(sample(host, small, positive, model=wired, negative=negative), expected)


@pytest.mark.parametrize("node", NODES)
def test_a_model_output_without_a_model_is_refused_where_it_is_taken(host, small, node):
    """The host shows the sentence at the node that takes the empty output."""
    import execution

    blocked = []

    def note(blocker):
        blocked.append(blocker)
        return blocker

    found = run_node(host, small, node)
    inputs = {"model": [found.model], "seed": [0], "steps": [1], "cfg": [1.0], "sampler_name": ["euler"]}
    inputs |= {"scheduler": ["normal"], "denoise": [1.0], "latent_image": [found.latent]}
    inputs |= {"positive": [found.conditioning], "negative": [small.negative]}
    asyncio.run(
        execution._async_map_node_over_list(
            "test", "1", host.nodes["KSampler"](), inputs, "sample", execution_block_cb=note
        )
    )
    assert "connect the model there" in blocked[0].message
