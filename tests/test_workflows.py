"""Every workflow that ships: it runs in the real host, opens in the real frontend, and answers to its inputs."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blip_qformer.checkpoint.ldm_keys import controlnet_to_ldm, stable_diffusion_checkpoint
from blip_qformer.cli.command_line import main as blip_qformer
from tests import oracle
from tests.random_weights import DEMO, SMALL, write_hub_folder
from tools.frontend import Frontend
from tools.host import PACK_NAME, ROOT, ComfyServer, History, WorkflowError, comfyui_path
from tools.layout import FREE, Box
from tools.thumbnails import CHANGES, small_prompt
from tools.workflow import override, to_prompt

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))

#: The smallest model the stock loaders take for SD1.5: its CLIP and VAE, and one level of its U-Net and ControlNet.
STOCK = dataclasses.replace(
    DEMO,
    width=768,
    qformer_heads=12,
    text_layers=12,
    text_heads=12,
    unet_channels=(320,),
    unet_attention=(True,),
    vae_channels=(128, 256, 512, 512),
)
CONTROLNETS = ("control_v11p_sd15_scribble_fp16.safetensors", "control_v11f1p_sd15_depth_fp16.safetensors")
FEW_STEPS = "pytorch_lora_weights.safetensors"  # of latent-consistency/lcm-lora-sdv1-5
LCM_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
LCM_LAYERS += ("conv_shortcut", "time_emb_proj", "samplers.0.conv")
TINY = "blipdiffusion-controlnet"  # of sizes that only our own loader knows
PLAIN_SD15, FAVOURITE = "v1-5-pruned-emaonly-fp16.safetensors", "DreamShaper_8_pruned.safetensors"

#: A picture of the same kind, for each that a workflow shows.
OTHER = {
    "blip-diffusion-cat.jpg": "blip-diffusion-cup.jpg",
    "blip-diffusion-cat-near.jpg": "blip-diffusion-cup.jpg",
    "blip-diffusion-cat-evening.jpg": "blip-diffusion-cup.jpg",
    "blip-diffusion-cup.jpg": "blip-diffusion-cat.jpg",
    "blip-diffusion-cup-painted.png": "blip-diffusion-cat.jpg",
    "blip-diffusion-rocket.jpg": "blip-diffusion-cat.jpg",
    "blip-diffusion-shirt.png": "blip-diffusion-cup.jpg",
    "blip-diffusion-dress-form.png": "blip-diffusion-cat.jpg",
    "blip-diffusion-scribble.png": "blip-diffusion-depth.png",
    "blip-diffusion-depth.png": "blip-diffusion-scribble.png",
}

#: Pixels by which Nodes 2.0 of older frontends moves a graph up when it enlarges its titles.
LIFTED = 24

#: Whose widgets are pixels.
SIZED = ("EmptyLatentImage", "ImageScale")
SAMPLERS = ("KSampler", "KSamplerAdvanced", "BLIPDiffusionDDIMInversion")
SAMPLED = 3  # steps
SHRUNK = 8
TILE = 512 // SHRUNK
STEPS = 3  # of subject-trajectory
SHEET = ((STEPS + 2) * (TILE + 1) + 1, TILE + 12 + 2)  # a row with its sources, gaps of one pixel and labels of twelve

#: Sizes of what is saved, where it is not one picture; an edit comes with its source.
SAVED = {
    "subject-trajectory": [SHEET],
    "three-subjects": [(TILE * 3 // 2, TILE)],
    "edit-generated": [(TILE, TILE)] * 2,
    "edit-photo": [(TILE, TILE)] * 2,
    "replace-two": [(TILE, TILE)] * 2,
    "try-on": [(TILE, TILE)] * 2,
}


@pytest.fixture(scope="module")
def stocked(server, tmp_path_factory) -> ComfyServer:
    """The server, given a random model under every name the workflows ask for."""
    models, folder = server.base / "models", tmp_path_factory.mktemp("weights")
    write_hub_folder(
        oracle.pipeline(DEMO, folder / "demo", comfyui_path()),
        models / "blip_diffusion" / TINY,
        controlnet=oracle.controlnet(DEMO),
    )
    save_file(few_steps_lora(oracle.pipeline(DEMO, folder / "demo", comfyui_path()).unet), models / "loras" / FEW_STEPS)
    tuned = oracle.pipeline(STOCK, folder / "stock", comfyui_path())
    hub = write_hub_folder(tuned, models / "blip_diffusion" / "blipdiffusion")
    assert blip_qformer(["convert", str(hub), str(folder / "converted")]) == 0
    shutil.move(folder / "converted" / "blip_diffusion_sd15.safetensors", models / "checkpoints")
    shutil.move(folder / "converted" / "blip2_qformer.safetensors", models / "blip_diffusion")
    weights = stable_diffusion_checkpoint(*(part.state_dict() for part in (tuned.unet, tuned.text_encoder, tuned.vae)))
    for seed, name in enumerate((PLAIN_SD15, FAVOURITE)):
        weights = nearby(weights, seed)
        save_file(weights, models / "checkpoints" / name)
    for seed, name in enumerate(CONTROLNETS):
        save_file(controlnet_to_ldm(oracle.controlnet(STOCK, seed).half().state_dict()), models / "controlnet" / name)
    return server


def few_steps_lora(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A random LoRA with the keys of latent-consistency/lcm-lora-sdv1-5, for a small U-Net: rank 4, not 64."""
    torch.manual_seed(0)
    weights = {}
    for name, layer in unet.named_modules():
        if name.endswith(LCM_LAYERS) and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            kernel = layer.weight.shape[2:]
            key = f"lora_unet_{name.replace('.', '_')}"
            weights[f"{key}.lora_down.weight"] = torch.randn(4, layer.weight.shape[1], *kernel) * 0.1
            weights[f"{key}.lora_up.weight"] = torch.randn(layer.weight.shape[0], 4, *[1] * len(kernel)) * 0.1
            weights[f"{key}.alpha"] = torch.tensor(4.0)
    return weights


def nearby(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The same weights and a little of others, in half precision: as checkpoints tuned from one another are."""
    torch.manual_seed(seed)
    tuned = {name: weight for name, weight in weights.items() if not name.startswith("first_stage_model.")}
    noisy = {name: weight + torch.randn(weight.shape) * 0.1 * weight.std() for name, weight in tuned.items()}
    return {name: weight.half().contiguous() for name, weight in {**weights, **noisy}.items()}


@pytest.fixture(scope="module", params=WORKFLOWS)
def workflow(request) -> str:
    """Each workflow; all tests of one follow each other, so that the server still has its models and results."""
    return request.param


def read_graph(workflow: str) -> dict:
    """A workflow as it is saved."""
    return json.loads((ROOT / "workflows" / f"{workflow}.json").read_text())


def small(server: ComfyServer, workflow: str) -> dict:
    """A workflow's prompt, made quick: three steps of 64 x 64 pixels, three pictures in a trajectory, a tiny model."""
    prompt = to_prompt(read_graph(workflow), server.object_info())
    needs_stock_sizes = any(nodes_of(prompt, loader) for loader in ("CheckpointLoaderSimple", "ControlNetLoader"))
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] in SIZED:
            inputs |= {name: inputs[name] // SHRUNK for name in ("width", "height")}
        elif node["class_type"] in SAMPLERS:
            inputs["steps"] = SAMPLED
        elif node["class_type"] == "BLIPDiffusionSubjectTrajectory":
            inputs["steps"] = STEPS
        elif node["class_type"] == "BLIPDiffusionSubjectFinetune":
            inputs |= {"steps": SAMPLED, "look_every": SAMPLED, "look_prompts": "in the snow", "resolution": TILE}
        elif node["class_type"] == "BLIPDiffusionSubjectSave":
            inputs["overwrite"] = True  # a test saves many things under one name
        elif node["class_type"] == "BLIPDiffusionLoader" and not needs_stock_sizes:
            inputs["checkpoint"] = TINY
    return prompt


def nodes_of(prompt: dict, class_type: str) -> list[str]:
    """The ids of the nodes of one class."""
    return [number for number, node in prompt.items() if node["class_type"] == class_type]


def changed(prompt: dict, number: str, **inputs: object) -> dict:
    """A copy of the prompt with other inputs in one node."""
    return {**prompt, number: {**prompt[number], "inputs": {**prompt[number]["inputs"], **inputs}}}


def saved(history: History, prompt: dict) -> list[Path]:
    """What the one Save Image of a prompt wrote; previews do not count."""
    (number,) = nodes_of(prompt, "SaveImage")
    return history.files[number]


def picture(server: ComfyServer, prompt: dict) -> np.ndarray:
    """What a prompt saves, several pictures below each other."""
    return np.concatenate([np.array(Image.open(file)) for file in saved(server.queue(prompt), prompt)])


def test_runs_and_is_cached(stocked, workflow):
    prompt = small(stocked, workflow)
    first = stocked.queue(prompt)
    assert [Image.open(file).size for file in saved(first, prompt)] == SAVED.get(workflow, [(TILE, TILE)])
    assert {*first.executed, *first.cached} == set(prompt)  # a node another workflow shares may be cached already
    assert len(first.executed) > len(first.cached)
    assert not stocked.queue(prompt).executed


def test_opens_and_runs_in_the_page(stocked, workflow, page):
    """What Run sends is the saved workflow, then what the widgets were set to; images show where nodes give some."""
    graph, info = read_graph(workflow), stocked.object_info()
    opened = page.open_workflow(graph)
    assert len(opened.boxes) == len(graph["nodes"])
    left, top, right, bottom = FREE
    page_sees = Box(left - 1, top - LIFTED, right - left + 2, bottom - top + LIFTED + 1)
    assert all(page_sees.contains(box) for box in opened.boxes.values())
    assert (opened.missing_types, opened.messages, opened.console_errors) == ((), (), ())
    assert opened.node_count == len(graph["nodes"])
    assert opened.prompt == to_prompt(graph, info)
    prompt = small(stocked, workflow)
    changes = {number: changed_inputs(opened.prompt[number], node) for number, node in prompt.items()}
    showing = {number for number, files in stocked.queue(prompt).files.items() if files[0].suffix == ".png"}
    showing |= set(nodes_of(prompt, "LoadImage"))
    run = page.run_workflow(changes, shows=showing)
    assert (run.end, run.exception_message, run.console_errors) == ("execution_success", "", ())
    assert run.prompt == prompt
    assert run.shown == showing
    assert settled_overlaps(page) == []


def settled_overlaps(page: Frontend) -> list[tuple[str, str]]:
    """Nodes that overlap once the page has come to rest: a new image is laid out some frames after it has come."""
    found = overlapping(page.measure_nodes())
    for _ in range(20):
        if not found:
            break
        time.sleep(0.25)
        found = overlapping(page.measure_nodes())
    return found


def overlapping(boxes: dict[str, Box]) -> list[tuple[str, str]]:
    """The ids of nodes that cover each other."""
    return [(one, other) for one, other in itertools.combinations(boxes, 2) if boxes[one].overlaps(boxes[other])]


def changed_inputs(before: dict, after: dict) -> dict[str, object]:
    """The inputs of a node that are others afterwards."""
    return {name: value for name, value in after["inputs"].items() if value != before["inputs"][name]}


def test_answers_to_picture_word_and_prompt(stocked, workflow):
    prompt = small(stocked, workflow)
    for number in nodes_of(prompt, "BLIPDiffusionSubjectFinetune"):
        prompt = changed(prompt, number, look_every=0)  # most of its time; what is shown on the way is tested elsewhere
    original = picture(stocked, prompt)
    changes = [override(prompt, "BLIPDiffusionPromptCompose", prompt="a table in a forest under the night sky")]
    for number in nodes_of(prompt, "LoadImage"):
        changes.append(changed(prompt, number, image=OTHER[prompt[number]["inputs"]["image"]]))
    for number in nodes_of(prompt, "BLIPDiffusionSubjectEncode") + nodes_of(prompt, "BLIPDiffusionSubjectFinetune"):
        changes.append(changed(prompt, number, subject_word="teapot"))
    for each in changes:
        assert not np.array_equal(picture(stocked, each), original)


def test_is_offered_as_a_template_with_a_thumbnail(stocked, workflow):
    assert workflow in requests.get(f"{stocked.url}/api/workflow_templates").json()[PACK_NAME]
    thumbnail = requests.get(f"{stocked.url}/api/workflow_templates/{PACK_NAME}/{workflow}.jpg")
    assert thumbnail.headers["Content-Type"] == "image/jpeg"
    assert len(thumbnail.content) < 80_000
    assert Image.open(io.BytesIO(thumbnail.content)).size == (400, 400)


@pytest.mark.parametrize("workflow", CHANGES)
def test_a_thumbnail_changes_inputs_that_are_there(stocked, workflow):
    original = to_prompt(read_graph(workflow), stocked.object_info())
    changed = small_prompt(workflow, stocked.object_info(), "mini")
    assert changed != original
    assert {number: node["inputs"].keys() for number, node in changed.items()} == {
        number: node["inputs"].keys() for number, node in original.items()
    }


def test_the_model_goes_through_every_node_that_can_bring_an_edit(workflow):
    """Where the host's memory is dynamic, an edit without this wire loads the checkpoint a second time."""
    for node in read_graph(workflow)["nodes"]:
        for wire in model_wires(node):
            assert wire.get("link") or wire.get("links"), node["type"]


def model_wires(node: dict) -> list[dict]:
    """The MODEL sockets of a node of this pack that gives a conditioning and its model; none of other nodes."""
    sockets = [socket for side in ("inputs", "outputs") for socket in node.get(side, []) if socket["type"] == "MODEL"]
    outputs = {socket["type"] for socket in node.get("outputs", [])}
    is_edit = node["type"].startswith("BLIPDiffusion") and outputs >= {"CONDITIONING", "MODEL"}
    return sockets if is_edit else []


def test_uses_no_node_that_the_host_calls_deprecated(server, workflow):
    info = server.object_info()
    assert [
        node["type"] for node in read_graph(workflow)["nodes"] if info.get(node["type"], {}).get("deprecated")
    ] == []


def test_shows_the_advanced_values_that_it_depends_on(server, workflow):
    """The frontend folds advanced inputs away; a graph that needs another value than the default shows them."""
    graph, info = read_graph(workflow), server.object_info()
    prompt = to_prompt(graph, info)
    for node in graph["nodes"]:
        if node["type"].startswith("BLIPDiffusion"):
            groups = info[node["type"]]["input"]
            specifications = {**groups.get("required", {}), **groups.get("optional", {})}
            inputs = prompt[str(node["id"])]["inputs"]
            changed = [
                name
                for name, (_, *options) in specifications.items()
                if options and options[0].get("advanced") and inputs.get(name) != options[0].get("default")
            ]
            assert not changed or node.get("showAdvanced"), (node["id"], changed)


def test_says_how_to_use_it_and_where_its_models_come_from(workflow):
    nodes = read_graph(workflow)["nodes"]
    (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    for node in nodes:
        for model in node["properties"].get("models", []):  # what the dialog of missing models offers
            assert model["name"] == node["widgets_values"][0]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(model["name"])
            assert model["url"] in note


def test_the_lora_for_few_steps_acts_as_a_whole_and_the_negative_prompt_only_above_cfg_1(stocked):
    prompt = small(stocked, "subject-fast")
    (lora,), (sampler,) = nodes_of(prompt, "LoraLoaderModelOnly"), nodes_of(prompt, "KSampler")
    (negative,) = nodes_of(prompt, "CLIPTextEncode")
    assert not np.array_equal(picture(stocked, prompt), picture(stocked, changed(prompt, lora, strength_model=0.0)))
    assert "lora key not loaded" not in stocked.log()
    other = changed(prompt, negative, text="a table in a forest")
    assert not np.array_equal(picture(stocked, prompt), picture(stocked, other))
    at_1 = [picture(stocked, changed(each, sampler, cfg=1.0)) for each in (prompt, other)]
    assert np.array_equal(*at_1)


def test_an_inpainted_picture_changes_where_it_is_painted_over(stocked):
    """The photograph is cut to its middle square, and what is painted over moves along with it."""
    prompt = small(stocked, "subject-inpaint")
    painted = Image.new("RGBA", (96, 64), (200, 100, 50, 255))
    painted.paste((200, 100, 50, 0), (32, 16, 72, 40))  # from 16, 16 to 56, 40 in the square that starts at 16
    painted.save(stocked.base / "input" / "painted.png")
    (number,) = [n for n in nodes_of(prompt, "LoadImage") if "painted" in prompt[n]["inputs"]["image"]]
    prompt = changed(prompt, number, image="painted.png")
    (encoded,), (sampler,) = nodes_of(prompt, "VAEEncode"), nodes_of(prompt, "KSampler")
    before, after = latents(stocked, prompt, encoded), latents(stocked, prompt, sampler)
    drawn = torch.zeros(8, 8, dtype=torch.bool)
    drawn[2:5, 2:7] = True  # a latent for each 8 x 8 pixels
    same = torch.isclose(after, before, rtol=1e-5, atol=1e-5)[0].all(0)
    assert torch.equal(same, ~drawn)


def test_the_sample_to_inpaint_is_painted_over_in_part(stocked):
    prompt = small(stocked, "subject-inpaint")
    (encoded,), (sampler,) = nodes_of(prompt, "VAEEncode"), nodes_of(prompt, "KSampler")
    before, after = latents(stocked, prompt, encoded), latents(stocked, prompt, sampler)
    same = torch.isclose(after, before, rtol=1e-5, atol=1e-5)[0].all(0)
    assert not same[2:6, 2:6].any()  # the cup
    assert same[-1].all()  # below it


def latents(server: ComfyServer, prompt: dict, number: str) -> torch.Tensor:
    """What one node of a prompt gives as a latent."""
    save = {"class_type": "SaveLatent", "inputs": {"samples": [number, 0], "filename_prefix": f"latents/{number}"}}
    ((file,),) = [files for node, files in server.queue({**prompt, "save": save}).files.items() if node == "save"]
    return load_file(file)["latent_tensor"]


def test_a_trajectory_is_drawn_from_one_noise(stocked):
    prompt = small(stocked, "subject-trajectory")
    tiles = tiles_of(picture(stocked, prompt))
    assert all(not np.array_equal(one, next_one) for one, next_one in zip(tiles, tiles[1:], strict=False))
    cups = override(prompt, "LoadImage", image="blip-diffusion-cup.jpg")
    same = override(cups, "BLIPDiffusionSubjectEncode", subject_word="cup")
    tiles = tiles_of(picture(stocked, same))
    assert max(np.abs(tile - tiles[0]).max() for tile in tiles) <= 1  # rows of a batch differ by rounding


def test_a_trajectory_too_large_for_memory_is_drawn_in_parts(stocked):
    """The server runs what follows once for each part, and Subject Grid lays all of them out together."""
    prompt = small(stocked, "subject-trajectory")
    whole = picture(stocked, prompt).astype(int)
    in_parts = picture(stocked, override(prompt, "BLIPDiffusionSubjectTrajectory", steps_at_once=2)).astype(int)
    assert in_parts.shape == whole.shape
    assert np.abs(in_parts - whole).mean() < 1  # of 255; weights are float16 here, and batches round differently


def tiles_of(sheet: np.ndarray) -> list[np.ndarray]:
    """The pictures of a trajectory's sheet, without its sources at both ends."""
    lefts = [1 + (TILE + 1) * column for column in range(1, STEPS + 1)]
    return [sheet[1 : 1 + TILE, left : left + TILE].astype(int) for left in lefts]


def test_what_was_learned_goes_onto_another_checkpoint(stocked):
    """Strength 0 is the favourite itself; on plain SD1.5, strength 1 is BLIP-Diffusion again."""
    prompt = small(stocked, "any-sd15")
    (load,) = nodes_of(prompt, "BLIPDiffusionLoader")
    (favourite,) = [
        each for each in nodes_of(prompt, "CheckpointLoaderSimple") if prompt[each]["inputs"]["ckpt_name"] == FAVOURITE
    ]
    nothing = override(override(prompt, "ModelMergeSubtract", multiplier=0.0), "CLIPMergeSubtract", multiplier=0.0)
    assert np.array_equal(picture(stocked, nothing), picture(stocked, drawn_by(prompt, favourite)))

    tuned = picture(stocked, drawn_by(changed(prompt, favourite, ckpt_name=PLAIN_SD15), load)).astype(int)
    on_plain = picture(stocked, changed(prompt, favourite, ckpt_name=PLAIN_SD15))
    on_favourite, plain = picture(stocked, prompt), picture(stocked, nothing)
    assert np.abs(on_plain - tuned).mean() < 0.02 * np.abs(plain - tuned).mean()  # rounding of float16 files
    assert np.abs(on_favourite - tuned).mean() > 0.1 * np.abs(plain - tuned).mean()


def drawn_by(prompt: dict, loader: str) -> dict:
    """A prompt whose model and CLIP come straight from one loader."""
    (sampler,) = nodes_of(prompt, "KSampler")
    straight = changed(prompt, sampler, model=[loader, 0])
    return override(
        override(straight, "BLIPDiffusionPromptCompose", clip=[loader, 1]), "CLIPTextEncode", clip=[loader, 1]
    )


@pytest.fixture(scope="module")
def networks(host, tmp_path_factory) -> dict[str, dict[str, object]]:
    """Three small models, as MODEL and as CLIP, in the host that computes in float32."""
    folder = tmp_path_factory.mktemp("merged")
    models, clips = {}, {}
    for seed, name in enumerate(("tuned", "base", "favourite")):
        hub = host.base / "models" / "blip_diffusion" / f"merged-{name}"
        write_hub_folder(oracle.pipeline(SMALL, folder / name, comfyui_path(), seed=20 * seed), hub)
        models[name], clips[name], *_ = host.run("BLIPDiffusionLoader", checkpoint=hub.name)
    return {"Model": models, "CLIP": clips}


def merged(host, networks: dict, kind: str, onto: str, strength: float) -> dict[str, torch.Tensor]:
    """The weights that the stock nodes make, wired as in any-sd15: onto + strength (tuned - base)."""
    one, two = f"{kind.lower()}1", f"{kind.lower()}2"
    subtracted = {one: networks[kind]["tuned"], two: networks[kind]["base"]}
    (difference,) = host.run(f"{kind}MergeSubtract", **subtracted, multiplier=strength)
    return weights_of(host.run(f"{kind}MergeAdd", **{one: networks[kind][onto], two: difference})[0])


@pytest.mark.parametrize("kind", ["Model", "CLIP"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_stock_merge_nodes_add_the_difference_to_every_weight(host, networks, kind, strength):
    tuned, base, favourite = (weights_of(networks[kind][name]) for name in ("tuned", "base", "favourite"))
    expected = {name: favourite[name] + strength * (tuned[name] - base[name]) for name in favourite}
    found = merged(host, networks, kind, "favourite", strength)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if strength == 0:
        assert all(torch.equal(found[name], favourite[name]) for name in favourite)


@pytest.mark.parametrize("kind", ["Model", "CLIP"])
def test_plain_sd15_and_the_difference_are_blip_diffusion(host, networks, kind):
    tuned = weights_of(networks[kind]["tuned"])
    torch.testing.assert_close(merged(host, networks, kind, "base", 1.0), tuned, rtol=1e-6, atol=1e-6)


def weights_of(network: object) -> dict[str, torch.Tensor]:
    """A MODEL's or CLIP's weights as they are when it is used, without the one that no SD1.5 file holds."""
    patcher = getattr(network, "patcher", network)
    for name in patcher.patches:
        patcher.patch_weight_to_device(name)
    state = patcher.model.state_dict()
    weights = {name: weight.clone() for name, weight in state.items() if "text_projection" not in name}
    patcher.unpatch_model()
    return weights


def test_the_log_holds_no_complaint_about_the_pack(stocked):
    complaints = ("Traceback", "Cannot import", "IMPORT FAILED", "does not exist, ignoring", "shape mismatch")
    assert not [line for line in stocked.log().splitlines() if any(complaint in line for complaint in complaints)]


def test_a_missing_model_is_said_before_anything_runs(stocked):
    prompt = override(small(stocked, "subject-generation"), "BLIPDiffusionLoader", checkpoint="gone")
    with pytest.raises(WorkflowError, match=r'Load.*"gone" was not found in .*Salesforce/blipdiffusion'):
        stocked.queue(prompt)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def test_an_error_of_the_library_is_a_value_error_with_its_sentence(stocked, page):
    """In what the server sends, and for what the page shows of it."""
    graph = read_graph("subject-generation")
    (stocked.base / "models" / "blip_diffusion" / "pointer.safetensors").write_text(LFS_POINTER)
    (loader,) = [str(node["id"]) for node in graph["nodes"] if node["type"] == "BLIPDiffusionLoader"]
    page.open_workflow(graph)
    run = page.run_workflow({loader: {"checkpoint": "pointer.safetensors"}})
    assert (run.end, run.exception_type) == ("execution_error", "ValueError")
    assert "pointer.safetensors is a git-lfs pointer" in run.exception_message
    assert "blip_qformer" not in run.text
    page.open_workflow(graph)  # takes the message off the page


def test_an_error_in_the_middle_leaves_nothing_behind(stocked):
    output = stocked.base / "output"
    before = sorted(output.rglob("*"))
    prompt = override(small(stocked, "subject-generation"), "BLIPDiffusionSubjectEncode", subject_word=" ")
    with pytest.raises(WorkflowError, match="The subject word is empty"):
        stocked.queue(prompt)
    assert sorted(output.rglob("*")) == before
    picture(stocked, small(stocked, "subject-generation"))  # and the next one runs
