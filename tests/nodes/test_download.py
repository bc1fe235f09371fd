"""Download BLIP-Diffusion: what it downloads inside the host, and what the loaders make of it."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from blip_qformer.checkpoint import open_checkpoint, save_qformer
from blip_qformer.checkpoint.convert import CHECKPOINT_NAME, CONTROLNET_NAME, QFORMER_NAME
from blip_qformer.checkpoint.ldm_keys import stable_diffusion_checkpoint
from blip_qformer.checkpoint.write_safetensors import write_safetensors
from tests import oracle
from tests.download.hub_server import hub_server

NODE = "BLIPDiffusionDownload"
LOADER = "BLIPDiffusionLoader"

#: SD1.5's widths, by which the host knows it, with fewer levels.
SHALLOW = dataclasses.replace(oracle.FULL, unet_channels=(320, 640), unet_attention=(True, False), unet_layers=1)


@pytest.fixture
def folders(host, checkpoints, monkeypatch, tmp_path):
    """The host's folders for models, empty."""
    import folder_paths

    names = ("checkpoints", "blip_diffusion", "controlnet", "diffusers")
    for name in names:
        extensions = folder_paths.folder_names_and_paths[name][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], extensions))
        (tmp_path / name).mkdir()
    return SimpleNamespace(**{name: tmp_path / name for name in names})


@pytest.fixture
def server(host, folders, monkeypatch):
    """A Hub with the host's small checkpoint as the published model."""
    model = host.module("blip_qformer.download.model")
    with hub_server(monkeypatch, host.module("blip_qformer.download.hub")) as server:
        server.add(model.MODEL, host.base / "models" / "blip_diffusion" / "hub")
        server.add(model.CONTROLNET, host.base / "models" / "blip_diffusion" / "hub")
        yield server


def options(host) -> list[str]:
    return host.nodes[LOADER].INPUT_TYPES()["required"]["checkpoint"][1]["options"]


def test_it_downloads_what_is_missing_and_then_nothing(host, folders, server, loaded):
    assert options(host) == ["(download the model first)"]
    fingerprint = host.nodes[NODE].fingerprint_inputs
    before = fingerprint(what="model")
    (report,) = host.run(NODE)
    assert report.endswith("The model is there. Press R, then choose blipdiffusion in Load BLIP-Diffusion.")
    assert os.listdir(folders.checkpoints) == [CHECKPOINT_NAME]
    assert os.listdir(folders.blip_diffusion) == [QFORMER_NAME]
    assert options(host) == [QFORMER_NAME, "blipdiffusion"]
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint="blipdiffusion")
    image = torch.rand(1, 50, 50, 3)
    vectors, expected = (each.encode([image], "dog", "crop") for each in (qformer, loaded.qformer))
    assert (vectors - expected).abs().max() < 0.03  # float16

    after = fingerprint(what="model")
    assert before != after
    server.tokens.clear()
    host.run(NODE)
    assert server.tokens == []
    assert fingerprint(what="model") == after  # so that the host does not run it again
    (folders.checkpoints / CHECKPOINT_NAME).unlink()
    assert fingerprint(what="model") != after


def test_the_node_shows_how_far_it_is_and_what_to_do_next(host, folders, server, monkeypatch):
    shown = []
    download = host.module("nodes.host.download")
    page = SimpleNamespace(send_progress_text=lambda text, node: shown.append((node, text)))
    monkeypatch.setattr(download, "PromptServer", SimpleNamespace(instance=page))
    download.download(controlnet=False, keep_original=False, node="7")
    download.show_text(None, "nowhere")
    assert {node for node, _ in shown} == {"7"}
    texts = [text for _, text in shown]
    size = (host.base / "models" / "blip_diffusion" / "hub" / "unet" / "diffusion_pytorch_model.bin").stat().st_size
    assert f"unet/diffusion_pytorch_model.bin: {size / 1e9:.2f} of {size / 1e9:.2f} GB" in texts
    assert any(text.startswith(f"{CHECKPOINT_NAME}: ") for text in texts)


def test_with_the_controlnet_there_is_a_third_file(host, folders, server):
    host.run(NODE, what="model and ControlNet")
    assert os.listdir(folders.controlnet) == [CONTROLNET_NAME]
    assert options(host) == [QFORMER_NAME, "blipdiffusion", "blipdiffusion-controlnet"]
    assert {name.split("/")[0] for name in server.ranges} == {"qformer", "unet", "text_encoder", "vae", "controlnet"}


def test_cancel_keeps_what_came_and_run_goes_on(host, folders, server):
    import comfy.model_management as management

    weights = "unet/diffusion_pytorch_model.bin"

    def cancel(handler, content, begin):
        handler.send_from(content, begin)
        management.interrupt_current_processing()

    server.faults[weights] = [cancel]
    with pytest.raises(management.InterruptProcessingException):
        host.run(NODE)
    assert not management.processing_interrupted()
    assert os.listdir(folders.checkpoints) == []
    assert [name for name in os.listdir(folders.blip_diffusion) if not name.endswith(".lock")] == [
        ".blipdiffusion.download"
    ]
    assert options(host) == ["(download the model first)"]
    server.faults.clear()
    server.ranges.clear()
    host.run(NODE)
    assert "qformer/pytorch_model.bin" not in server.ranges
    assert os.listdir(folders.checkpoints) == [CHECKPOINT_NAME]


def test_what_goes_wrong_is_a_plain_sentence(host, folders, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    del server.repositories[host.module("blip_qformer.download.model").MODEL]
    with pytest.raises(ValueError, match=r"was not downloaded, because the server answered 404") as error:
        host.run(NODE)
    assert type(error.value) is ValueError


def test_a_file_in_any_of_the_hosts_folders_is_there(host, folders, server, monkeypatch, tmp_path):
    import folder_paths

    host.run(NODE)
    entry = folder_paths.folder_names_and_paths["checkpoints"]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path / "x"), *entry[0]], entry[1])
    )
    server.tokens.clear()
    host.run(NODE)
    assert server.tokens == []


DO_THIS = (
    "Download the model first: add the node Download BLIP-Diffusion and press Run, or run "
    "python -m blip_qformer download in this pack's folder."
)


@pytest.mark.parametrize("loader", [LOADER, "BLIPDiffusionQFormerLoader"])
@pytest.mark.parametrize("name", ["blipdiffusion", QFORMER_NAME, "(download the model first)", "mine"])
def test_the_first_thing_that_an_empty_loader_says_is_what_to_do(host, folders, loader, name):
    with pytest.raises(ValueError, match="was found in|was not found in") as error:
        host.run(loader, checkpoint=name)
    assert str(error.value).startswith(DO_THIS)
    assert str(folders.blip_diffusion) in str(error.value)


def test_the_canny_workflow_asks_for_the_controlnet(host, folders):
    with pytest.raises(ValueError, match="was not found in") as error:
        host.run("BLIPDiffusionControlNetLoader", checkpoint="blipdiffusion-controlnet")
    assert str(error.value).startswith(
        "Download the model first: add the node Download BLIP-Diffusion, choose model and ControlNet and press Run, or "
        "run python -m blip_qformer download --controlnet in this pack's folder."
    )


def test_where_other_models_are_a_missing_one_is_only_missing(host, checkpoints):
    with pytest.raises(ValueError, match='^"mine" was not found in '):
        host.run(LOADER, checkpoint="mine")
    with pytest.raises(ValueError, match='^Download the model first: .*"blipdiffusion" was not found in '):
        host.run(LOADER, checkpoint="blipdiffusion")


@pytest.mark.parametrize("name", ["blipdiffusion", QFORMER_NAME, "(download the model first)", "mine", "../mine"])
def test_a_graph_that_lacks_the_model_is_refused_by_raising_what_to_do(host, folders, name):
    """Newer pages show at once what validation raises, and nothing of what it returns or of what fails at run time."""
    with pytest.raises(ValueError, match="^Download the model first: "):
        host.nodes[LOADER].validate_inputs(checkpoint=name)
    assert host.nodes[LOADER].validate_inputs(checkpoint=None) is True  # comes over a link


@pytest.fixture
def converted(host, folders, monkeypatch):
    """Converted files, with stand-ins for those that the host's own loaders read."""
    opened = open_checkpoint(host.base / "models" / "blip_diffusion" / "hub")
    save_qformer(folders.blip_diffusion / QFORMER_NAME, opened.encoder_state_dict, opened.encoder_config)
    for file in (folders.checkpoints / CHECKPOINT_NAME, folders.controlnet / CONTROLNET_NAME):
        save_file({"nothing": torch.zeros(1)}, file)
    return folders


def test_the_hosts_own_loader_reads_the_converted_file(host, converted):
    """At SD1.5's own widths: what is loaded is what was written."""
    networks = (oracle.unet(SHALLOW), oracle.text_encoder(oracle.FULL), oracle.vae(oracle.FULL))
    weights = stable_diffusion_checkpoint(*(network.state_dict() for network in networks))
    write_safetensors(converted.checkpoints / CHECKPOINT_NAME, weights, dtype=torch.float16, overwrite=True)
    model, clip, vae, qformer = host.run(LOADER, checkpoint="blipdiffusion")
    loaded = {
        "model.diffusion_model.": model.model.diffusion_model,
        "cond_stage_model.transformer.": clip.cond_stage_model.clip_l.transformer,
        "first_stage_model.": vae.first_stage_model,
    }
    for prefix, network in loaded.items():
        state_dict = network.state_dict()
        written = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        assert len(written) > 100
        for name, each in written.items():
            assert torch.equal(state_dict[name].float(), each.half().float()), name
    assert qformer.encode([torch.rand(1, 50, 50, 3)], "dog", "crop").shape[-2:] == (16, 128)


def test_the_hosts_own_loader_reads_the_converted_controlnet(host, converted, monkeypatch):
    """A whole one is read in tests/cli/test_convert.py; here it is asked for the right file."""
    import comfy.controlnet

    monkeypatch.setattr(comfy.controlnet, "load_controlnet", lambda path: path)
    path = host.run("BLIPDiffusionControlNetLoader", checkpoint="blipdiffusion-controlnet")[0]
    assert path == str(converted.controlnet / CONTROLNET_NAME)


def test_files_that_the_host_does_not_know_are_a_sentence(host, converted):
    with pytest.raises(ValueError, match=rf"{CHECKPOINT_NAME} is no Stable Diffusion 1.5 that ComfyUI knows"):
        host.run(LOADER, checkpoint="blipdiffusion")
    with pytest.raises(ValueError, match=rf"{CONTROLNET_NAME} is no ControlNet that ComfyUI knows"):
        host.run("BLIPDiffusionControlNetLoader", checkpoint="blipdiffusion-controlnet")


def test_another_file_of_the_three_is_read_again(host, converted):
    before = host.nodes[LOADER].fingerprint_inputs(checkpoint="blipdiffusion")
    os.utime(converted.checkpoints / CHECKPOINT_NAME, ns=(0, 0))
    assert host.nodes[LOADER].fingerprint_inputs(checkpoint="blipdiffusion") != before


def test_a_folder_of_that_name_comes_first(host, converted):
    (converted.blip_diffusion / "blipdiffusion").mkdir()
    paths = host.module("nodes.host.model_paths")
    assert paths.CHECKPOINTS.path("blipdiffusion") == converted.blip_diffusion / "blipdiffusion"
    assert paths.converted_files("blipdiffusion") == {}
