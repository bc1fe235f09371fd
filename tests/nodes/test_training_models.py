"""Which model fine-tuning works on: the host's own, or a copy where memory is dynamic; the given one is untouched."""

from __future__ import annotations

import gc
import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dynamic_memory import turn_on
from tests.nodes.test_finetune import tune

RATE = {"learning_rate": 1e-3}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two views, [2, H, W, 3]."""
    return torch.rand(2, 72, 80, 3, generator=torch.Generator().manual_seed(1))


def dynamic(patcher):
    """A patcher that says its memory is dynamic, on any host, and the list of static copies that were made of it."""
    from comfy.model_patcher import ModelPatcher

    copies = []
    load, arguments = patcher.cached_patcher_init  # the loader's own way to the file

    def load_again(disable_dynamic=False):
        assert disable_dynamic
        fresh = load(*arguments, disable_dynamic=True)
        copies.append(weakref.ref(fresh.model))
        return fresh

    class Dynamic(ModelPatcher):
        def is_dynamic(self):
            return True

        def loaded_ram_size(self):
            return 0

        def clone(self, disable_dynamic=False, **options):
            if "disable_dynamic" in inspect.signature(ModelPatcher.clone).parameters:
                return super().clone(disable_dynamic=disable_dynamic, **options)
            clone = super().clone()
            if disable_dynamic:  # as a newer host does it
                clone.__class__, clone.model = ModelPatcher, load_again(True).model
                clone.backup, clone.object_patches_backup, clone.pinned = {}, {}, set()
            else:
                clone.cached_patcher_init = self.cached_patcher_init
            return clone

    patcher = patcher.clone()
    patcher.__class__ = Dynamic
    patcher.cached_patcher_init = (load_again, ())
    return patcher, copies


@pytest.fixture
def given(request, host, loaded) -> SimpleNamespace:
    """The loaded checkpoint with plain or dynamic memory, and the copies that were made of its MODEL and its CLIP."""
    if request.param == "plain":
        return SimpleNamespace(**vars(loaded), copies=[[], []])
    model, models = dynamic(loaded.model)
    clip = loaded.clip.clone()
    clip.patcher, encoders = dynamic(loaded.clip.patcher)
    return SimpleNamespace(model=model, clip=clip, vae=loaded.vae, qformer=loaded.qformer, copies=[models, encoders])


def networks_again(host):
    """MODEL, CLIP and VAE, read from the file once more."""
    checkpoint = host.module("blip_qformer.checkpoint").open_checkpoint(host.base / "models" / "blip_diffusion" / "hub")
    return host.module("nodes.host.networks").build_networks(checkpoint)


memory = pytest.mark.parametrize("given", ["plain", "dynamic"], indirect=True)


def state_of(*patchers) -> dict:
    """Everything that could be left behind in models: parameters by identity and bits, hooks, methods, options."""
    found = {}
    for index, patcher in enumerate(patchers):
        for name, weight in patcher.model.named_parameters():
            bits = weight.detach().clone().flatten().view(torch.uint8)  # what the host never set may be NaN
            found[index, name] = (id(weight), weight.data_ptr(), weight.dtype, bits)
        for name, module in patcher.model.named_modules():
            found[index, name, "module"] = (len(module._forward_hooks), "forward" in vars(module), module.training)
    return found


def assert_untouched(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values[:3] == after[name][:3], name
        assert all(torch.equal(old, new) for old, new in zip(values[3:], after[name][3:], strict=True)), name


def assert_freed(copies: list) -> None:
    """No copy is in memory any more."""
    gc.collect()
    assert [reference() for made in copies for reference in made if reference() is not None] == []


@memory
@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_the_given_models_are_untouched_and_the_result_is_the_same(host, loaded, given, images, trains, caplog):
    """To the last bit, whether it worked on the host's own weights or on copies; those are one each, and freed."""
    import comfy.model_management as management

    caplog.set_level("INFO")
    expected = tune(host, loaded, images, trains=trains, **RATE)
    caplog.clear()
    management.load_models_gpu([given.model, given.clip.patcher])
    before = state_of(given.model, given.clip.patcher)
    tuned = tune(host, given, images, trains=trains, **RATE)
    assert_untouched(before, state_of(given.model, given.clip.patcher))
    assert torch.equal(tuned.subject.vectors, expected.subject.vectors)
    assert tuned.weights.keys() == expected.weights.keys()
    assert all(torch.equal(tuned.weights[name], tensor) for name, tensor in expected.weights.items())
    assert any(tensor.any() for name, tensor in tuned.weights.items() if not name.endswith(("alpha", "down.weight")))
    copied = is_copied(given)
    assert [len(made) for made in given.copies] == [copied, copied]
    assert ("works on a copy of the model" in caplog.text) == copied
    assert ("works on the model in memory" in caplog.text) != copied
    assert_freed(given.copies)


def is_copied(given: SimpleNamespace) -> bool:
    """Whether these models have dynamic memory."""
    return hasattr(given.model, "is_dynamic") and given.model.is_dynamic()


@memory
def test_a_lora_on_the_given_model_counts(host, loaded, given, images):
    """It is tuned on top of the LoRA, on a copy as on the model itself."""
    import comfy.sd

    lora = tune(host, loaded, images, seed=5, learning_rate=1e-2).weights
    patched = {
        name: SimpleNamespace(**{**vars(each), "model": comfy.sd.load_lora_for_models(each.model, None, lora, 1, 0)[0]})
        for name, each in (("expected", loaded), ("given", given))
    }
    expected, tuned = (tune(host, patched[name], images, **RATE) for name in ("expected", "given"))
    without = tune(host, loaded, images, **RATE)
    assert torch.equal(tuned.subject.vectors, expected.subject.vectors)
    assert not torch.equal(tuned.subject.vectors, without.subject.vectors)
    assert patched["given"].model.patches.keys() == patched["expected"].model.patches.keys()


@memory
@pytest.mark.parametrize("trains", ["low-rank", "full"])
@pytest.mark.parametrize("ends", ["cancelled", "failed"])
def test_cancelled_or_failed_the_given_models_are_untouched(host, given, images, monkeypatch, trains, ends):
    """In the backward pass of the second step, the deepest that it can end in; the copies are freed then too."""
    import comfy.model_management as management

    management.load_models_gpu([given.model, given.clip.patcher])
    before = state_of(given.model, given.clip.patcher)
    errors = {"cancelled": management.InterruptProcessingException, "failed": torch.OutOfMemoryError}
    tuning = host.module("blip_qformer.finetune.loop").SubjectTuning
    loss_of = tuning.loss

    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            raise errors[ends]

    monkeypatch.setattr(
        tuning, "loss", lambda self, batch: (Ends.apply if self.losses else torch.clone)(loss_of(self, batch))
    )
    if ends == "failed":
        with pytest.raises(torch.OutOfMemoryError):
            tune(host, given, images, trains=trains, **RATE)
    else:
        assert "1 steps, step 1 kept" in tune(host, given, images, trains=trains, **RATE).report
        assert management.processing_interrupted()
        management.interrupt_current_processing(False)
    assert_untouched(before, state_of(given.model, given.clip.patcher))
    assert_freed(given.copies)


@pytest.mark.parametrize("given", ["dynamic"], indirect=True)
def test_the_copies_leave_the_device_and_others_stay(host, given, images, monkeypatch):
    """Also while something still holds the copies; with their last reference they would leave it by themselves."""
    import comfy.model_management as management

    module, held = host.module("nodes.host.training_models"), []
    static_copy = module.static_copy
    monkeypatch.setattr(module, "static_copy", lambda patcher: held.append(static_copy(patcher)) or held[-1])
    others = [given.vae.patcher, given.qformer.patcher]
    management.load_models_gpu(others)
    tune(host, given, images, **RATE)
    assert [other.loaded_size() > 0 for other in others] == [True, True]
    assert [copy.loaded_size() for copy in held] == [0, 0]


@pytest.mark.parametrize("given", ["dynamic"], indirect=True)
def test_a_model_that_cannot_be_loaded_again_is_refused(host, given, images):
    given.model.cached_patcher_init = None
    with pytest.raises(ValueError, match="does not say how it is loaded again: use Load BLIP-Diffusion"):
        tune(host, given, images)


@pytest.mark.parametrize("given", ["dynamic"], indirect=True)
def test_too_little_memory_for_the_copies_is_said_before_they_are_made(host, given, images, monkeypatch):
    """On a CPU training and copies share the main memory, and the estimate counts both."""
    import comfy.model_management as management

    sizes = given.model.model_size() + given.clip.patcher.model_size()
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: sizes)
    with pytest.raises(ValueError, match=r"beside the models, and cpu has 0.0 GB free"):
        tune(host, given, images)
    module = host.module("nodes.host.training_models")
    with pytest.raises(ValueError, match=r"of main memory for a copy of the model, .* close other programs"):
        module.require_copies([given.model, given.clip.patcher], sizes + 1)
    assert given.copies == [[], []]


@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_mapped_weights_that_layers_cast_stay_mapped(host, loaded, images, tmp_path, trains):
    """Half precision straight from a file's memory, cast by the host's layers when they run; the file is as it was."""
    model, clip, _ = networks_again(host)
    network, file = model.model.diffusion_model, tmp_path / "unet.safetensors"
    save_file({name: weight.half().contiguous() for name, weight in network.state_dict().items()}, file)
    content = file.read_bytes()
    network.load_state_dict(load_file(file), assign=True)
    for module in network.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    before = state_of(model, clip.patcher)
    given = SimpleNamespace(model=model, clip=clip, vae=loaded.vae, qformer=loaded.qformer)
    tuned = tune(host, given, images, trains=trains, **RATE)
    assert_untouched(before, state_of(model, clip.patcher))
    assert file.read_bytes() == content
    expected = tune(host, loaded, images, trains=trains, **RATE)
    torch.testing.assert_close(tuned.subject.vectors, expected.subject.vectors, atol=2e-2, rtol=0)


@pytest.fixture
def really_dynamic(host, checkpoints, monkeypatch) -> SimpleNamespace:
    """What Load BLIP-Diffusion gives where the host itself makes MODEL, CLIP, VAE and Q-Former dynamic."""
    if not turn_on(monkeypatch.setattr, SimpleNamespace()):
        pytest.skip("this version of the host has no dynamic memory")
    model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint="hub")
    return SimpleNamespace(model=model, clip=clip, vae=vae, qformer=qformer)


@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_models_that_the_host_makes_dynamic_are_untouched_and_the_result_is_the_same(
    host, loaded, really_dynamic, images, trains
):
    patchers = [getattr(each, "patcher", each) for each in vars(really_dynamic).values()]
    assert all(patcher.is_dynamic() for patcher in patchers)
    before = [{name: weight.clone() for name, weight in each.model.state_dict().items()} for each in patchers]
    found = tune(host, really_dynamic, images, trains=trains, **RATE)
    expected = tune(host, loaded, images, trains=trains, **RATE)
    assert torch.equal(found.subject.vectors, expected.subject.vectors)
    for patcher, weights in zip(patchers, before, strict=True):
        for name, weight in patcher.model.state_dict().items():
            assert torch.equal(weight.nan_to_num(), weights[name].nan_to_num()), name  # the host leaves some unset
