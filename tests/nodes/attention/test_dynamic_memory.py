"""Edits, LoRAs and merges on our models where the host's memory is dynamic: what is loaded again, and what is not."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.dynamic_memory import turn_on
from tests.nodes.attention.graphs import plain, sample, under_controlnet, with_lora
from tests.nodes.attention.test_carrier import NODES, run_node
from tests.nodes.test_prompt import compose
from tests.test_workflows import WORKFLOWS, model_wires, read_graph
from tests.test_workflows import small as quick_prompt
from tools.workflow import override


@pytest.fixture
def dynamic(host, small, monkeypatch) -> SimpleNamespace:
    """The small model in a host with dynamic memory, and how often its files were read again."""
    if not turn_on(monkeypatch.setattr, counts := SimpleNamespace(loads=0)):
        pytest.skip("this version of the host has no dynamic memory")
    model, clip, _, _ = host.run("BLIPDiffusionLoader", checkpoint="editing")
    factory, inputs = model.cached_patcher_init

    def load(*arguments, **options):
        counts.loads += 1
        return factory(*arguments, **options)

    model.cached_patcher_init = (load, inputs)
    return SimpleNamespace(model=model, clip=clip, subject=small.subject, negative=small.negative, counts=counts)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("graph", [plain, under_controlnet])
def test_with_the_wire_nothing_is_loaded_again(host, small, dynamic, node, graph):
    expected = run_node(host, small, node)
    positive, negative, _ = graph(host, small, expected.conditioning)
    picture = sample(host, small, positive, expected.latent, negative=negative)
    found = run_node(host, dynamic, node, model=dynamic.model)
    positive, negative, _ = graph(host, dynamic, found.conditioning)
    for _ in range(2):
        wired = sample(host, dynamic, positive, found.latent, model=found.model, negative=negative)
        assert torch.equal(wired, picture)
    assert (dynamic.counts.delegates, dynamic.counts.loads) == (0, 0)


@pytest.mark.parametrize("node", NODES)
def test_without_the_wire_a_model_is_loaded_again_once(host, small, dynamic, node):
    """The host asks at each run; the same MODEL keeps the copy that it was given first."""
    expected = run_node(host, small, node)
    picture = sample(host, small, expected.conditioning, expected.latent)
    found = run_node(host, dynamic, node)
    for _ in range(3):
        assert torch.equal(sample(host, dynamic, found.conditioning, found.latent, model=dynamic.model), picture)
    assert (dynamic.counts.delegates, dynamic.counts.loads) == (3, 1)


def test_a_lora_in_hooks_loads_the_model_again_once(host, small, dynamic):
    """It patches weights for one side alone, which the host does not do with dynamic ones."""
    conditioning = run_node(host, dynamic, "reweight", model=dynamic.model)
    patched = with_lora(host, small, conditioning.conditioning, small.negative)
    expected = run_node(host, small, "reweight", model=small.model)
    static = with_lora(host, small, expected.conditioning, small.negative)
    picture = sample(host, small, static[0], model=expected.model, negative=static[1])
    for _ in range(2):
        found = sample(host, dynamic, patched[0], model=conditioning.model, negative=patched[1])
        assert torch.equal(found, picture)
    assert dynamic.counts.loads == 1
    assert not torch.equal(picture, sample(host, small, expected.conditioning, model=expected.model))


@pytest.mark.parametrize("order", ["one after the other", "both before the first picture"])
def test_another_weight_under_a_lora_in_hooks_loads_nothing_again(host, small, dynamic, order):
    """The node gives a new clone of its MODEL at each run; all of them, and what others clone of them, share one copy.

    So do two edits behind each other, of which the first one changes.
    """

    def run(source, weights):
        positive = compose(host, source, source.subject)[0]
        model = source.model
        for each in (weights, "<subject>:0.5"):
            positive, model = host.run(
                "BLIPDiffusionAttentionReweight", conditioning=positive, weights=each, model=model
            )
        return [with_lora(host, small, positive, source.negative), model.clone()]

    def pictures(source):
        runs, found = [], []
        for weights in ("snow:2", "snow:6"):
            runs.append(run(source, weights))
            if order == "one after the other":
                found.append(sample(host, source, runs[-1][0][0], model=runs[-1][1], negative=runs[-1][0][1]))
        return found or [sample(host, source, both[0], model=model, negative=both[1]) for both, model in runs]

    for found, expected in zip(pictures(dynamic), static := pictures(small), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(*static)
    assert (dynamic.counts.delegates, dynamic.counts.loads) == (2, 1)


def test_the_shared_copy_leaves_private_ones_alone(host, small, dynamic):
    """Train LoRA and fine-tuning ask for a copy of their own, and change its weights."""
    wired = run_node(host, dynamic, "reweight", model=dynamic.model).model
    shared, again = wired.get_non_dynamic_delegate(), wired.clone().get_non_dynamic_delegate()
    private = wired.clone(disable_dynamic=True)
    assert shared.model is again.model is dynamic.model.get_non_dynamic_delegate().model
    assert len({id(each.model) for each in (shared, private, wired)}) == 3
    assert [each.is_dynamic() for each in (shared, private, wired, wired.clone())] == [False, False, True, True]
    assert shared.get_wrappers("outer_sample", "blip_attention_edits")
    assert dynamic.counts.loads == 2


def test_merges_and_loras_need_no_copy(host, small, dynamic):
    """ModelMergeSimple with itself at twice the weights, and the difference as a LoRA: the same as without."""
    pictures = []
    for each in (small, dynamic):
        name = "diffusion_model.input_blocks.1.1.proj_in.weight"
        shape = small.model.model.state_dict()[name].shape
        patched = each.model.clone()
        assert patched.add_patches({name: ("diff", (torch.full(shape, 0.05),))}, 1.0)
        (half,) = host.run("ModelMergeSimple", model1=patched, model2=each.model, ratio=0.5)
        positive = plain(host, each, run_node(host, each, "reweight").conditioning)[0]
        bare = [[tensor, {}] for tensor, _ in positive]
        pictures.append([sample(host, each, bare, model=model) for model in (patched, half, each.model)])
    for found, expected in zip(*pictures, strict=True):
        assert torch.equal(found, expected)
    assert len({picture.sum().item() for picture in pictures[0]}) == 3
    assert (dynamic.counts.delegates, dynamic.counts.loads) == (0, 0)


EDITS = sorted({each["type"] for name in WORKFLOWS for each in read_graph(name)["nodes"] if model_wires(each)})
EDIT_WORKFLOWS = [name for name in WORKFLOWS if any(map(model_wires, read_graph(name)["nodes"]))]


def sampled(host, prompt) -> torch.Tensor:
    """What the one sampler of a prompt gives; the nodes before it run as in the host."""
    results = {}

    def run(number):
        if number not in results:
            node = prompt[number]
            inputs = {
                name: run(value[0])[value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            results[number] = host.run(node["class_type"], **inputs)
        return results[number]

    (sampler,) = [number for number, node in prompt.items() if node["class_type"].startswith("KSampler")]
    return run(sampler)[0]["samples"]


def without_wires(prompt) -> dict:
    """A prompt in which every model comes from the loader, and no edit node gets one."""
    prompt = copy.deepcopy(prompt)
    (loader,) = [number for number, node in prompt.items() if node["class_type"] == "BLIPDiffusionLoader"]
    for node in prompt.values():
        if node["inputs"].pop("model", None) and node["class_type"] not in EDITS:
            node["inputs"]["model"] = [loader, 0]
    return prompt


@pytest.mark.parametrize("workflow", EDIT_WORKFLOWS)
def test_a_shipped_edit_loads_nothing_again(host, small, monkeypatch, workflow):
    """The same picture as with plain memory, and without a static copy, which the same graph without the wire needs."""
    info = {
        name: {"input": node.INPUT_TYPES(), "display_name": name} for name, node in host.nodes.items() if name in used()
    }
    prompt = quick_prompt(SimpleNamespace(object_info=lambda: info), workflow)
    prompt = override(prompt, "BLIPDiffusionLoader", checkpoint="editing")
    expected = sampled(host, prompt)
    if not turn_on(monkeypatch.setattr, counts := SimpleNamespace()):
        pytest.skip("this version of the host has no dynamic memory")
    assert torch.equal(sampled(host, prompt), expected)
    assert counts.delegates == 0
    assert torch.equal(sampled(host, without_wires(prompt)), expected)
    assert counts.delegates == 1


def used() -> set[str]:
    """The classes of all nodes of these workflows."""
    return {node["type"] for name in EDIT_WORKFLOWS for node in read_graph(name)["nodes"]}
