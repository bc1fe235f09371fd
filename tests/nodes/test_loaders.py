"""The two loaders: what they build, what they offer, and what they say when there is nothing to load."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip_qformer.checkpoint import open_checkpoint, save_qformer
from blip_qformer.encoder import preprocess

LOADERS = ["BLIPDiffusionLoader", "BLIPDiffusionQFormerLoader"]


@pytest.fixture
def models(host, checkpoints):
    """The host's models folder; what a test puts into it is gone after the test."""
    folders = [host.base / "models" / name for name in ("blip_diffusion", "diffusers")]
    before = {path for folder in folders for path in folder.iterdir()}
    yield host.base / "models"
    for path in {path for folder in folders for path in folder.iterdir()} - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def options(host, loader: str = LOADERS[0]) -> list[str]:
    return host.nodes[loader].INPUT_TYPES()["required"]["checkpoint"][1]["options"]


def test_pack_loads_without_a_warning(host):
    assert "BLIPDiffusionLoader" in host.nodes
    assert not [line for line in host.load_log.splitlines() if line.startswith(("WARNING", "ERROR"))]


@pytest.mark.parametrize("loader", LOADERS)
def test_folders_and_files_are_listed(host, models, loader):
    (models / "blip_diffusion" / "notes.txt").write_text("no model")
    diffusers = models / "diffusers"
    (diffusers / "blipdiffusion-canny" / "qformer").mkdir(parents=True)
    (diffusers / "some-sdxl" / "unet").mkdir(parents=True)
    listed = options(host, loader)
    assert {"hub", "lavis", "checkpoint_40.pth", "blipdiffusion-canny"} <= set(listed)
    assert not {"notes.txt", "some-sdxl"} & set(listed)


def test_folders_of_extra_model_paths_are_listed(host, models, tmp_path):
    import folder_paths
    from utils.extra_config import load_extra_path_config

    shutil.copytree(models / "blip_diffusion" / "hub" / "qformer", tmp_path / "elsewhere" / "mine" / "qformer")
    config = tmp_path / "extra_model_paths.yaml"
    config.write_text(f"mine:\n    base_path: {tmp_path}\n    blip_diffusion: elsewhere\n")
    load_extra_path_config(str(config))
    try:
        assert "mine" in options(host)
        host.run("BLIPDiffusionQFormerLoader", checkpoint="mine")
    finally:
        folder_paths.folder_names_and_paths["blip_diffusion"][0].remove(str(tmp_path / "elsewhere"))


def write_hub_cache(repository: Path, source: Path, commit: str = "8a2b", main: str | None = None) -> Path:
    """A repository as huggingface_hub keeps it in its cache: links with the files' names to blobs with none."""
    for file in (path for path in source.rglob("*") if path.is_file()):
        blob = repository / "blobs" / f"{commit}-{len([*repository.glob('blobs/*')])}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = repository / "snapshots" / commit / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(main or commit)
    return repository


@pytest.mark.parametrize("folder", ["blip_diffusion", "diffusers"])
def test_the_hubs_cache_is_listed_and_loads(host, models, loaded, folder):
    name = "models--Salesforce--blipdiffusion"
    write_hub_cache(models / folder / name, models / "blip_diffusion" / "hub")
    assert [option for option in options(host) if "Salesforce" in option or option in ("blobs", "snapshots")] == [name]
    _, _, _, qformer = host.run("BLIPDiffusionLoader", checkpoint=name)
    image = torch.rand(1, 50, 50, 3)
    assert torch.equal(qformer.encode([image], "dog", "crop"), loaded.qformer.encode([image], "dog", "crop"))


def test_other_repositories_in_the_cache_of_diffusers_are_not_listed(host, models):
    write_hub_cache(models / "diffusers" / "models--someone--vae", models / "blip_diffusion" / "hub" / "vae")
    assert "models--someone--vae" not in options(host)


@pytest.mark.parametrize("kind", ["blip_diffusion", "diffusers"])
@pytest.mark.parametrize("source", ["hub", "lavis"])
def test_the_contents_of_a_folder_put_straight_in_are_one_model(
    host, models, loaded, monkeypatch, tmp_path, kind, source
):
    """Beside them lie a model of its own and a single file, whose encoder must not be taken for the folder's."""
    import folder_paths

    root = tmp_path / "straight"
    shutil.copytree(models / "blip_diffusion" / source, root)
    shutil.copytree(models / "blip_diffusion" / "hub", root / "another")
    opened = open_checkpoint(models / "blip_diffusion" / "hub")
    other = {name: tensor * 2 for name, tensor in opened.encoder_state_dict.items()}
    save_qformer(root / "blip2_qformer.safetensors", other, opened.encoder_config, dtype=None)
    for name in ("blip_diffusion", "diffusers"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(root)] if name == kind else [], set()))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(root)], set()))
    assert options(host) == [
        "another",
        *(["blip2_qformer.safetensors"] if kind == "blip_diffusion" else []),
        "straight",
    ]
    _, _, _, qformer = host.run("BLIPDiffusionLoader", checkpoint="straight")
    image = torch.rand(1, 50, 50, 3)
    torch.testing.assert_close(qformer.encode([image], "dog", "crop"), loaded.qformer.encode([image], "dog", "crop"))


def test_some_parts_put_straight_in_are_named_as_not_whole(host, models, monkeypatch, tmp_path):
    import folder_paths

    root = tmp_path / "straight"
    for name in ("unet", "vae"):
        shutil.copytree(models / "blip_diffusion" / "hub" / name, root / name)
    shutil.copytree(models / "blip_diffusion" / "hub", root / "another")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "blip_diffusion", ([str(root)], set()))
    assert {"unet", "vae"}.isdisjoint(options(host))
    with pytest.raises(ValueError, match=r"straight holds no whole BLIP-Diffusion checkpoint .*diffusers VAE.*U-Net"):
        host.run("BLIPDiffusionLoader", checkpoint="straight")


def test_clipseg_is_found_in_the_hubs_cache_and_put_straight_in(host, models, monkeypatch, tmp_path):
    import folder_paths

    root = tmp_path / "clipseg"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    cache = write_hub_cache(root / "models--CIDAS--clipseg-rd64-refined", tmp_path / "source")
    shutil.copy(tmp_path / "source" / "config.json", root)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clipseg", ([str(root)], set()))
    found = host.module("nodes.host.model_paths").SEGMENTATION_MODELS
    assert found.options() == ["clipseg", cache.name]
    assert found.path("clipseg") == root
    assert found.path(cache.name) == cache / "snapshots" / "8a2b"


def test_a_single_file_loads(host, models, loaded):
    checkpoint = open_checkpoint(models / "blip_diffusion" / "hub")
    file = models / "blip_diffusion" / "blip2_qformer.safetensors"
    save_qformer(file, checkpoint.encoder_state_dict, checkpoint.encoder_config, dtype=None)
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint=file.name)
    image = torch.rand(1, 50, 50, 3)
    assert torch.equal(qformer.encode([image], "dog", "crop"), loaded.qformer.encode([image], "dog", "crop"))


def test_networks_have_the_sizes_of_the_folder(loaded, pipeline):
    unet = loaded.model.model.diffusion_model
    assert sum(w.numel() for w in unet.parameters()) == sum(w.numel() for w in pipeline.unet.parameters())
    assert loaded.model.model.latent_format.scale_factor == pipeline.vae.config.scaling_factor
    assert loaded.vae.downscale_ratio == 8
    clip = loaded.clip.cond_stage_model.clip_l.transformer
    assert clip.num_layers == pipeline.text_encoder.config.num_hidden_layers


def test_the_qformer_is_under_the_hosts_memory_management(host, loaded):
    import comfy.model_management as management

    loaded.qformer.encode([torch.rand(1, 50, 50, 3)], "dog", "crop")
    assert loaded.qformer.patcher in [model.model for model in management.current_loaded_models]
    management.unload_all_models()
    assert loaded.qformer.patcher not in [model.model for model in management.current_loaded_models]
    loaded.qformer.encode([torch.rand(1, 50, 50, 3)], "dog", "crop")  # and comes back


def test_the_qformer_runs_with_little_memory(host, checkpoints, loaded):
    """What --lowvram does: most weights stay offloaded and are cast for each use."""
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint="hub")
    image = torch.rand(1, 50, 50, 3)
    qformer.patcher.load(qformer.patcher.load_device, lowvram_model_memory=1)
    assert qformer.patcher.model.model_lowvram
    pixel_values = preprocess(image, size=qformer.encoder.config.vision.image_size)
    assert torch.equal(qformer.encoder(pixel_values, ["dog"]), loaded.qformer.encode([image], "dog", "crop"))


@pytest.mark.parametrize(
    ("flag", "dtype"), [("fp16_text_enc", torch.float16), ("bf16_text_enc", torch.bfloat16), (None, torch.float16)]
)
def test_the_hosts_flags_choose_the_precision(host, checkpoints, loaded, monkeypatch, flag, dtype):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp32_text_enc", False)
    if flag:
        monkeypatch.setattr(args, flag, True)
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint="hub")
    assert {weight.dtype for weight in qformer.encoder.parameters()} == {dtype}
    image = torch.rand(1, 50, 50, 3, generator=torch.Generator().manual_seed(0))
    vectors, expected = (each.encode([image], "dog", "crop") for each in (qformer, loaded.qformer))
    assert vectors.dtype == torch.float32
    assert (vectors - expected).abs().max() < (0.2 if dtype is torch.bfloat16 else 0.03)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_empty_folder_says_what_to_do(host, models, monkeypatch, tmp_path, loader):
    import folder_paths

    for name in ("blip_diffusion", "diffusers"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], set()))
    (nothing,) = options(host, loader)
    with pytest.raises(ValueError, match="No BLIP-Diffusion model was found") as error:
        host.run(loader, checkpoint=nothing)
    for expected in (
        str(tmp_path / "blip_diffusion"),
        str(tmp_path / "diffusers"),
        "Salesforce/blipdiffusion",
        "qformer",
    ):
        assert expected in str(error.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_name_that_is_gone_says_so(host, models, loader):
    with pytest.raises(ValueError, match='"../../secrets" was not found in'):
        host.run(loader, checkpoint="../../secrets")


def test_a_qformer_alone_points_to_its_own_loader(host, models):
    shutil.copytree(models / "blip_diffusion" / "hub" / "qformer", models / "blip_diffusion" / "alone" / "qformer")
    with pytest.raises(ValueError, match="has no unet.*Load BLIP-2 Q-Former"):
        host.run("BLIPDiffusionLoader", checkpoint="alone")


@pytest.fixture
def broken(models):
    """A copy of "hub" called "broken", and a function that rewrites the weights of one of its components."""
    folder = shutil.copytree(models / "blip_diffusion" / "hub", models / "blip_diffusion" / "broken")

    def rewrite(component: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        (file,) = (folder / component).glob("*.bin")
        torch.save(change(torch.load(file, weights_only=True)), file)

    return rewrite


HOLES = [
    ("unet", "mid_block.resnets.0.conv1.weight"),
    ("unet", "down_blocks.0.resnets.0.norm1.bias"),
    ("vae", "decoder.conv_norm_out.bias"),
    ("text_encoder", "encoder.layers.0.self_attn.q_proj.bias"),
]


@pytest.mark.parametrize(("component", "hole"), HOLES)
def test_a_network_with_a_hole_is_named(host, broken, component, hole):
    broken(component, lambda weights: {name: tensor for name, tensor in weights.items() if not name.endswith(hole)})
    with pytest.raises(ValueError, match=rf"{component}.*\.bin.*lacks tensors.*{re.escape(hole)}"):
        host.run("BLIPDiffusionLoader", checkpoint="broken")


@pytest.mark.parametrize(
    ("component", "level"),
    [("unet", "up_blocks.1."), ("vae", "decoder.up_blocks.3."), ("text_encoder", "encoder.layers.1.")],
)
def test_a_network_without_a_level_is_told_by_its_config(host, broken, component, level):
    broken(component, lambda weights: {name: tensor for name, tensor in weights.items() if level not in name})
    with pytest.raises(ValueError, match=rf"{component}.*\.bin.*its config tells of"):
        host.run("BLIPDiffusionLoader", checkpoint="broken")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_tensor_of_another_shape_is_named(host, broken, component):
    name = {"unet": "mid_block.resnets.0.conv2.bias", "vae": "decoder.conv_out.bias"}.get(
        component, "text_model.final_layer_norm.bias"
    )
    broken(component, lambda weights: weights | {name: torch.zeros(7)})
    with pytest.raises(ValueError, match=rf"{component}.*\.bin does not fit its own config.*size mismatch.*bias"):
        host.run("BLIPDiffusionLoader", checkpoint="broken")


def test_a_link_to_the_drop_down_is_left_to_the_run(host):
    """What comes over a link is not known when a graph is validated; the host then asks with None."""
    assert host.nodes["BLIPDiffusionLoader"].validate_inputs(None) is True


def test_of_two_folders_with_one_name_the_first_is_taken(host, models, monkeypatch, tmp_path):
    import folder_paths

    roots = [tmp_path / "first", tmp_path / "second"]
    for root in roots:
        (root / "same").mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "blip_diffusion", ([str(root) for root in roots], set()))
    assert host.module("nodes.host.model_paths").CHECKPOINTS.path("same") == roots[0] / "same"


@pytest.mark.parametrize("name", ["copy", "checkpoint_40.pth"])
@pytest.mark.parametrize("loader", [*LOADERS, "BLIPDiffusionControlNetLoader", "BLIPDiffusionTunedSubjectLoader"])
def test_other_files_under_one_name_are_read_again(host, models, loader, name):
    """As after another fine-tuning: the host runs a node again when its fingerprint is another one."""
    folder = models / "blip_diffusion"
    shutil.copytree(folder / "hub", folder / "copy", copy_function=shutil.copy2)
    fingerprint = host.nodes[loader].fingerprint_inputs
    before = fingerprint(checkpoint=name)
    assert fingerprint(checkpoint=name) == before
    file = next((folder / "copy" / "unet").glob("*.bin")) if name == "copy" else folder / name
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert fingerprint(checkpoint=name) != before
    assert fingerprint(checkpoint=None) == ()  # comes over a link


@pytest.mark.parametrize("flag", ["fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc"])
def test_eight_bit_weights_run(host, checkpoints, monkeypatch, flag):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp32_text_enc", False)
    monkeypatch.setattr(args, flag, True)
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint="hub")
    assert torch.isfinite(qformer.encode([torch.rand(1, 50, 50, 3)], "dog", "crop")).all()


def test_a_lora_is_called_a_lora(host, models):
    lora = {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}
    save_file(lora, models / "blip_diffusion" / "lora.safetensors")
    with pytest.raises(ValueError, match="is a LoRA, not BLIP-Diffusion"):
        host.run("BLIPDiffusionLoader", checkpoint="lora.safetensors")


def test_a_tuned_checkpoint_gives_its_subject(host, checkpoints):
    """The authors' layout: the U-Net and the vectors it was tuned with, in one file."""
    (subject,) = host.run("BLIPDiffusionTunedSubjectLoader", checkpoint="checkpoint_40.pth", subject_word=" teapot ")
    model, clip, *_ = host.run("BLIPDiffusionLoader", checkpoint="checkpoint_40.pth")
    saved = torch.load(host.base / "models" / "blip_diffusion" / "checkpoint_40.pth")["model"]["ctx_embeddings_cache"]
    assert torch.equal(subject.vectors, saved)
    assert subject.word == "teapot"
    positive, text = host.run("BLIPDiffusionPromptCompose", clip=clip, subject=subject, prompt="in the snow")
    assert text.startswith("a teapot in the snow")
    latent = host.ddim(model, positive, positive, {"samples": torch.zeros(1, 4, 8, 8)}, 2, 1.0, 0)
    assert latent["samples"].isfinite().all()


def test_a_checkpoint_without_a_tuned_subject_says_so(host, checkpoints):
    with pytest.raises(ValueError, match="hub holds no tuned subject: choose"):
        host.run("BLIPDiffusionTunedSubjectLoader", checkpoint="hub", subject_word="dog")


def test_nothing_loaded_depends_on_its_files(host, models, pipeline):
    """Files of a model in use are written over in place, as cp does: a mapped file would end the process."""
    import comfy.model_management as management

    folder = shutil.copytree(models / "blip_diffusion" / "hub", models / "blip_diffusion" / "overwritten")
    for part, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        (folder / part / f"{file}.bin").unlink()
        save_file(getattr(pipeline, part).state_dict(), folder / part / f"{file}.safetensors")  # one of each kind
    model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint=folder.name)
    (control_net,) = host.run("BLIPDiffusionControlNetLoader", checkpoint=folder.name)
    management.unload_all_models()
    networks = (
        model.model, clip.cond_stage_model, vae.first_stage_model, control_net.control_model, qformer.patcher.model
    )  # fmt: skip
    before = [{name: weight.clone() for name, weight in each.state_dict().items()} for each in networks]
    for file in folder.rglob("*"):
        if file.suffix in (".bin", ".safetensors"):
            os.truncate(file, 0)
            file.write_bytes(b"\xff" * 1000)
    for network, weights in zip(networks, before, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
    if (maps := Path("/proc/self/maps")).exists():  # an open map is what keeps Windows from replacing a file
        assert str(folder) not in maps.read_text()
        assert not [
            number
            for number in os.listdir("/proc/self/fd")
            if str(folder) in os.path.realpath(f"/proc/self/fd/{number}")
        ]
