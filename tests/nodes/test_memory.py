"""Our models under the host's memory management: how the host builds the same model once more from its files."""

from __future__ import annotations

import gc
import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.clipseg import write_clipseg
from tests.dynamic_memory import turn_on
from tests.host import InputList
from tests.nodes.test_prompt import compose, stock
from tools.host_versions import NEWER_NODES, trained_lora

#: The same weights in every layout.
CHECKPOINTS = ("hub", "lavis", "checkpoint_40.pth")

#: Weights that the host's text encoder has, and SD1.5's file has not.
NOT_IN_FILES = re.compile("text_projection|logit_scale")


@pytest.fixture
def dynamic(host, checkpoints, monkeypatch) -> SimpleNamespace:
    """What Load BLIP-Diffusion gives for "hub" in a host with dynamic memory."""
    if not turn_on(monkeypatch.setattr, counts := SimpleNamespace()):
        pytest.skip("this version of the host has no dynamic memory")
    model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint="hub")
    return SimpleNamespace(model=model, clip=clip, vae=vae, qformer=qformer, counts=counts)


def patchers(loaded) -> dict[str, object]:
    """The patchers of what Load BLIP-Diffusion gives, by name."""
    return {
        "model": loaded.model,
        "clip": loaded.clip.patcher,
        "vae": loaded.vae.patcher,
        "qformer": loaded.qformer.patcher,
    }


def load(host, checkpoint) -> dict[str, object]:
    names = ("model", "clip", "vae", "qformer")
    outputs = host.run("BLIPDiffusionLoader", checkpoint=checkpoint)
    return patchers(SimpleNamespace(**dict(zip(names, outputs, strict=True))))


def weights(patcher) -> dict[str, Tensor]:
    """All weights but the projection that SD1.5's text encoder lacks: the host leaves it as it finds the memory."""
    return {name: weight for name, weight in patcher.model.state_dict().items() if "text_projection" not in name}


def sampled(host, loaded, model=None, positive=None) -> Tensor:
    if positive is None:
        positive = stock(host, loaded.clip, "a dog in the snow")
    return host.run(
        "KSampler",
        model=model or loaded.model,
        seed=3,
        steps=2,
        cfg=4.0,
        sampler_name="euler",
        scheduler="normal",
        positive=positive,
        negative=stock(host, loaded.clip, "ugly"),
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        denoise=1.0,
    )[0]["samples"]


def stages(host, loaded) -> dict[str, Tensor]:
    """A subject's vectors, a prompt with it, latents, and the image of them."""
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    subject, _ = host.run("BLIPDiffusionSubjectEncode", qformer=loaded.qformer, image=image, subject_word="dog")
    positive, _ = compose(host, loaded, subject)
    latents = sampled(host, loaded, positive=positive)
    (decoded,) = host.run("VAEDecode", vae=loaded.vae, samples={"samples": latents / latents.std()})
    return {"vectors": subject.vectors, "prompt": positive[0][0], "latents": latents, "image": decoded}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("arguments", [{}, {"disable_dynamic": True}])
def test_a_model_is_built_again_in_memory_of_its_own(host, checkpoints, checkpoint, arguments):
    for name, patcher in load(host, checkpoint).items():
        factory, inputs = patcher.cached_patcher_init
        again = factory(*inputs, **arguments)
        assert type(again) is type(patcher)
        assert again.cached_patcher_init == (factory, inputs), name
        assert (again.load_device, again.offload_device) == (patcher.load_device, patcher.offload_device)
        found, expected = weights(again), weights(patcher)
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            assert torch.equal(found[key], weight), f"{name}: {key}"
            assert found[key].untyped_storage().data_ptr() != weight.untyped_storage().data_ptr(), f"{name}: {key}"


def test_a_model_that_is_built_again_draws_the_same(host, loaded):
    factory, inputs = loaded.model.cached_patcher_init
    assert torch.equal(sampled(host, loaded, factory(*inputs)), sampled(host, loaded))


def test_what_no_weight_tells_is_built_again(host, checkpoints):
    """The scaling of the latents, which the MODEL has from the VAE's config."""
    model = load(host, "hub")["model"]
    scale_factor, model.model.latent_format.scale_factor = model.model.latent_format.scale_factor, 1.0
    factory, inputs = model.cached_patcher_init
    assert factory(*inputs).model.latent_format.scale_factor == scale_factor != 1.0


def test_dynamic_memory_changes_no_result(host, loaded, dynamic):
    expected, found = stages(host, loaded), stages(host, dynamic)
    for patcher in patchers(dynamic).values():
        assert patcher.is_dynamic()
    for stage, tensor in expected.items():
        assert torch.equal(found[stage], tensor), stage
    assert dynamic.counts.delegates == 0


@pytest.fixture
def half(host, checkpoints) -> Iterator[Path]:
    """A checkpoint in half precision, which the host casts, with files of both kinds."""
    folder = host.base / "models" / "blip_diffusion" / "half"
    shutil.copytree(folder.parent / "hub", folder)
    for file in folder.rglob("*.bin"):
        tensors = torch.load(file)
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        if file.parent.name == "unet":
            file.unlink()
            save_file(tensors, file.with_suffix(".safetensors"))
        else:
            torch.save(tensors, file)
    yield folder
    shutil.rmtree(folder)


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """First address, and the one behind the last, of what this process has mapped of a folder's files."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(folder) in line]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def file_weights(patcher) -> dict[str, Tensor]:
    """The weights that a file gives: SD1.5's text encoder has a scale of its own."""
    return {name: weight for name, weight in patcher.model.named_parameters() if not NOT_IN_FILES.search(name)}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not show what a process has mapped")
@pytest.mark.parametrize("is_dynamic", [False, True], ids=["plain", "dynamic"])
def test_only_dynamic_weights_stay_the_mapped_file(host, half, monkeypatch, is_dynamic):
    """In its precision, and none of them elsewhere; plain weights are copied, and those of the encoder cast."""
    if is_dynamic and not turn_on(monkeypatch.setattr, SimpleNamespace()):
        pytest.skip("this version of the host has no dynamic memory")
    # On a CPU, where it is made, a CLIP is loaded at once, and its smallest layers are then the host's copies.
    monkeypatch.setattr(
        importlib.import_module("comfy.model_management"), "load_models_gpu", lambda *_, **options: None
    )
    loaded = load(host, half.name)
    gc.collect()
    ranges = mapped_ranges(half)
    for name, patcher in loaded.items():
        found = file_weights(patcher)
        assert len(found) > 10
        for key, weight in found.items():
            is_mapped = any(start <= weight.data_ptr() < end for start, end in ranges)
            assert is_mapped == is_dynamic, f"{name}: {key}"
            if is_dynamic or name == "qformer":
                assert weight.dtype == (torch.float16 if is_dynamic else torch.float32), f"{name}: {key}"
    assert bool(ranges) == is_dynamic


def test_layers_know_in_which_precision_they_compute(host, dynamic):
    """So that dynamic weights in the file's precision are cast when a layer fetches them."""
    for name, patcher in patchers(dynamic).items():
        for module in patcher.model.modules():
            for key, weight in module.named_parameters(recurse=False):
                assert hasattr(module, f"{key}_comfy_model_dtype"), f"{name}: {type(module).__name__}.{key}"
                assert weight.device.type == "cpu"


def test_factories_build_the_kind_of_memory_that_is_asked_for(host, loaded, dynamic):
    """With equal weights. The host calls any patcher plain that it asked for as such, so they are called by hand."""
    for name, patcher in patchers(dynamic).items():
        factory, inputs = patcher.cached_patcher_init
        options = [({}, True)]
        if name != "vae":  # the host's VAE cannot be told
            options.append(({"disable_dynamic": True}, False))
        for arguments, is_dynamic in options:
            again = factory(*inputs, **arguments)
            assert again.is_dynamic() is is_dynamic, name
            assert again.model is not patcher.model
            assert_equal_weights(again, patchers(loaded)[name], name)


def assert_equal_weights(found, expected, name):
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), f"{name}: {key}"


def test_a_static_copy_of_a_dynamic_model_draws_the_same(host, loaded, dynamic):
    """What the host asks for where it may not touch dynamic weights."""
    for name, patcher in patchers(dynamic).items():
        if name != "vae":  # the host's VAE cannot be told
            static = patcher.clone(disable_dynamic=True)
            assert not static.is_dynamic()
            assert static.model is not patcher.model
            assert_equal_weights(static, patchers(loaded)[name], name)
    static = dynamic.model.clone(disable_dynamic=True)
    assert torch.equal(sampled(host, loaded, static), sampled(host, loaded))
    assert static.clone().model is static.model


def test_clipseg_is_never_dynamic(host, dynamic):
    """Its layers fetch no weights, and the host would not free what a dynamic patcher moved to the device."""
    from comfy.model_patcher import ModelPatcher

    folder = write_clipseg(host.base / "models" / "clipseg" / "small")
    assert type(host.module("nodes.host.managed").ManagedSegmenter(folder).patcher) is ModelPatcher


def test_parameters_of_no_layer_come_to_the_device_of_the_input(host, loaded):
    """Only layers of the host fetch weights. On the meta device nothing is computed, but all must be there."""
    encoder = loaded.qformer.encoder
    bare = {
        name
        for path, module in encoder.named_modules()
        for name, _ in module.named_parameters(path, recurse=False)
        if not hasattr(module, "comfy_cast_weights")
    }
    assert bare == {"vision.class_embedding", "vision.position_embedding", "qformer.query_tokens"}
    assert not [*encoder.buffers()]
    size = encoder.config.vision.image_size
    for module in encoder.modules():
        if hasattr(module, "comfy_cast_weights"):
            assert module.comfy_cast_weights
    vectors = encoder(torch.zeros(1, 3, size, size, device="meta"), ["dog"])
    assert vectors.device.type == "meta"
    assert {weight.device.type for weight in encoder.parameters()} == {"cpu"}


def train_lora(host, loaded, model, steps=2) -> dict[str, Tensor]:
    """The stock Train LoRA on two latents."""
    torch.manual_seed(0)  # the node's own seed is not that of the LoRA's first values
    latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    # One by one: 0.3.75 cannot train on a single LATENT.
    latents = InputList([{"samples": latent} for latent in latents])
    inputs = {"latents": latents, "positive": stock(host, loaded.clip, "a dog"), "steps": steps, "rank": 2}
    precision = {"training_dtype": "fp32", "lora_dtype": "fp32"}
    return trained_lora(host.run("TrainLoraNode", model=model, **inputs, **precision))


def test_the_stock_train_lora_trains_our_model(host, loaded):
    before = sampled(host, loaded)
    lora = train_lora(host, loaded, loaded.model)
    assert any(tensor.abs().sum() > 0 for name, tensor in lora.items() if "lora_up" in name)
    assert torch.equal(sampled(host, loaded), before)
    import comfy.sd

    tuned, _ = comfy.sd.load_lora_for_models(loaded.model, None, lora, 1.0, 0.0)
    assert not torch.equal(sampled(host, loaded, tuned), before)


def test_the_stock_train_lora_trains_the_same_on_dynamic_memory(host, loaded, dynamic):
    """All but the smallest layers: of dynamic ones below 16 kB, the host's training changes none."""
    found, expected = (train_lora(host, loaded, each.model, steps=1) for each in (dynamic, loaded))
    assert found.keys() == expected.keys()
    trained = [name for name, tensor in found.items() if "lora_down" in name and tensor.any()]
    assert len(trained) > 10
    for name in trained:  # AdamW makes a whole step of the rounding of the smallest gradients
        assert (found[name] - expected[name]).norm() <= 0.05 * expected[name].norm(), name
    assert torch.equal(sampled(host, loaded, dynamic.model), sampled(host, loaded))


@pytest.mark.parametrize("kind", ["loaded", "dynamic"])
def test_our_models_on_another_device(host, loaded, kind, request):
    """Select Device and multi-GPU nodes; a CPU has one device only, so the copy is made by the host's own call."""
    if "SelectModelDevice" not in host.nodes:
        pytest.skip(f"SelectModelDevice came in {NEWER_NODES['SelectModelDevice']}")
    ours = request.getfixturevalue(kind)
    expected = stages(host, loaded)
    (model,) = host.run("SelectModelDevice", model=ours.model, device="cpu")
    (clip,) = host.run("SelectCLIPDevice", clip=ours.clip, device="cpu")
    (vae,) = host.run("SelectVAEDevice", vae=ours.vae, device="default")
    (model,) = host.run("MultiGPU_WorkUnits", model=model, max_gpus=2)
    for patcher in (model, clip.patcher):
        assert not patcher.is_dynamic()
    found = stages(host, SimpleNamespace(model=model, clip=clip, vae=vae, qformer=ours.qformer))
    for stage, tensor in expected.items():
        assert torch.equal(found[stage], tensor), stage
    for name, patcher in patchers(ours).items():
        copy = patcher.deepclone_multigpu()
        assert type(copy) is type(patcher)
        assert copy.model is not patcher.model, name
        for key, weight in weights(patcher).items():
            assert torch.equal(weights(copy)[key], weight), f"{name}: {key}"
