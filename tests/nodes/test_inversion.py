"""DDIM Inversion in the host: the reference's numbers, and stock sampling that finds the image again."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMInverseScheduler

from tests.nodes.test_prompt import compose, stock

SCALE = 0.18215  # of Stable Diffusion's latents
SIZE = (8, 12)
CLOSE = 5  # refinements with which 20 steps of a random model are inverted to less than FOUND
FOUND = 0.05  # of an image's standard deviation


@pytest.fixture
def image() -> dict[str, torch.Tensor]:
    """A latent as VAE Encode gives it: smooth, with about the variance of images."""
    coarse = torch.randn(1, 4, 3, 4, generator=torch.manual_seed(0))
    return {"samples": torch.nn.functional.interpolate(coarse, size=SIZE, mode="bicubic") / SCALE}


@pytest.fixture
def prompt(host, loaded, subject) -> list:
    """A subject and where it is."""
    return compose(host, loaded, subject, prompt="in the snow")[0]


def invert(host, model, conditioning, latent, steps=20, refinements=CLOSE):
    inputs = {"model": model, "conditioning": conditioning, "latent": latent}
    return host.run("BLIPDiffusionDDIMInversion", **inputs, steps=steps, refinements=refinements)


def sample_again(host, model, conditioning, latent, settings: str, **changes):
    """Run the stock sampler as the node says it should be set."""
    words = dict(re.findall(r"(\w+): (\S+)", settings))
    numbers = {name: int(words.pop(name)) for name in ("steps", "start_at_step", "end_at_step")}
    inputs = {**words, **numbers, "cfg": float(words["cfg"]), "noise_seed": 5, "negative": conditioning, **changes}
    return host.run("KSamplerAdvanced", model=model, positive=conditioning, latent_image=latent, **inputs)[0]["samples"]


def plain(host, loaded, conditioning, latent) -> torch.Tensor:
    """A quick inversion."""
    return invert(host, loaded.model, conditioning, latent, steps=5, refinements=0)[0]["samples"]


def error(host, model, conditioning, latent, **inputs) -> float:
    """Error of the image that comes back, in its standard deviations."""
    inverted, settings = invert(host, model, conditioning, latent, **inputs)
    found = sample_again(host, model, conditioning, inverted, settings)
    return ((found - latent["samples"]).std() / latent["samples"].std()).item()


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_without_refinements_it_is_the_references_inversion(host, loaded, pipeline, subject, prompt, image, steps):
    inverted, _ = invert(host, loaded.model, prompt, image, steps, refinements=0)
    context = pipeline.encode_prompt(subject.vectors, ["a dog in the snow"])
    scheduler = DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    expected = image["samples"] * SCALE
    for timestep in scheduler.timesteps:
        noise = pipeline.unet(expected, timestep, context).sample
        expected = scheduler.step(noise, timestep, expected).prev_sample
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[-1]]
    torch.testing.assert_close(inverted["samples"] * SCALE * alpha.sqrt(), expected, atol=1e-3, rtol=0)


def test_the_stock_sampler_finds_the_image_again(host, loaded, prompt, image):
    assert error(host, loaded.model, prompt, image) < FOUND


def test_steps_and_refinements_bring_it_closer(host, loaded, prompt, image):
    tries = [(10, 0), (10, 2), (20, 2), (20, 5)]
    errors = [error(host, loaded.model, prompt, image, steps=steps, refinements=more) for steps, more in tries]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < FOUND


def test_a_number_of_steps_that_does_not_divide_1000(host, loaded, prompt, image):
    assert error(host, loaded.model, prompt, image, steps=15, refinements=8) < FOUND  # the host makes 16 of them


def test_sampler_custom_finds_it_too(host, loaded, prompt, image):
    inverted, _ = invert(host, loaded.model, prompt, image)
    (sampler,) = host.run("KSamplerSelect", sampler_name="ddim")
    (sigmas,) = host.run("BasicScheduler", model=loaded.model, scheduler="ddim_uniform", steps=20, denoise=1.0)
    found = host.run(
        "SamplerCustom",
        model=loaded.model,
        add_noise=False,
        noise_seed=0,
        cfg=1.0,
        positive=prompt,
        negative=prompt,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=inverted,
    )[0]["samples"]
    assert (found - image["samples"]).std() < FOUND * image["samples"].std()


def test_with_other_settings_it_is_not_found(host, loaded, prompt, image):
    inverted, settings = invert(host, loaded.model, prompt, image)
    for changes in ({"cfg": 3.0}, {"add_noise": "enable"}, {"sampler_name": "euler_ancestral"}, {"steps": 10}):
        other = sample_again(
            host, loaded.model, prompt, inverted, settings, negative=stock(host, loaded.clip, ""), **changes
        )
        assert (other - image["samples"]).std() > 0.1 * image["samples"].std()


def test_with_a_controlnet(host, loaded, prompt, image):
    (control_net,) = host.run("BLIPDiffusionControlNetLoader", checkpoint="hub")
    applied, _ = host.run(
        "ControlNetApplyAdvanced",
        positive=prompt,
        negative=prompt,
        control_net=control_net,
        image=torch.rand(1, 8 * SIZE[0], 8 * SIZE[1], 3, generator=torch.manual_seed(1)),
        strength=1.0,
        start_percent=0.1,
        end_percent=0.8,
    )
    assert error(host, loaded.model, applied, image, refinements=10) < FOUND
    with_control, without = (plain(host, loaded, each, image) for each in (applied, prompt))
    assert (with_control - without).std() > 0.1 * without.std()


def test_with_area_mask_and_timestep_conditioning(host, loaded, prompt, image):
    (left,) = host.run("ConditioningSetArea", conditioning=prompt, width=48, height=64, x=0, y=0, strength=1.0)
    other = stock(host, loaded.clip, "a hat")
    mask = torch.zeros(1, *SIZE)
    mask[:, :, 5:] = 1
    (masked,) = host.run(
        "ConditioningSetMask", conditioning=other, mask=mask, strength=0.8, set_cond_area="mask bounds"
    )
    (late,) = host.run("ConditioningSetTimestepRange", conditioning=masked, start=0.4, end=1.0)
    assert error(host, loaded.model, [*left, *late, *prompt], image) < FOUND


def test_with_a_hook_that_changes_on_the_way(host, loaded, prompt, image):
    """Weights whose strength follows keyframes are met backwards, and the run after it meets them forwards again."""
    import comfy.hooks

    weights = loaded.model.model.state_dict()
    changed = {
        name: weight * 0.5 for name, weight in weights.items() if ".attn" in name and name.startswith("diffusion_model")
    }

    def hooked(keyframes: list[tuple[float, float]]):
        hooks = comfy.hooks.create_hook_model_as_lora(changed, None, strength_model=1.0, strength_clip=1.0)
        group = comfy.hooks.HookKeyframeGroup()
        for start, strength in keyframes:
            group.add(comfy.hooks.HookKeyframe(strength, start))
        (hooks,) = host.run("SetHookKeyframes", hooks=hooks, hook_kf=group)
        return host.run(
            "ConditioningSetProperties", cond_NEW=prompt, strength=1.0, set_cond_area="default", hooks=hooks
        )[0]

    scheduled = hooked([(0.0, 1.0), (0.001, 0.5), (0.3, 0.2), (0.32, 0.6), (0.7, 0.0)])
    two_groups = [*scheduled, *stock(host, loaded.clip, "a hat")]  # the host keeps the weights of several groups
    for conditioning in (scheduled, two_groups):
        before = draw_fresh(host, loaded, conditioning)
        assert error(host, loaded.model, conditioning, image) < FOUND
        plain(host, loaded, conditioning, image)
        assert torch.equal(draw_fresh(host, loaded, conditioning), before)
    constant = hooked([(0.0, 1.0)])
    with_schedule, without = (plain(host, loaded, each, image) for each in (scheduled, constant))
    assert (with_schedule - without).std() > 0.01 * without.std()


def draw_fresh(host, loaded, positive) -> torch.Tensor:
    """An ordinary run."""
    empty = {"samples": torch.zeros(1, 4, *SIZE)}
    return host.ddim(loaded.model, positive, positive, empty, steps=5, guidance=1.0, seed=0)["samples"]


@pytest.mark.parametrize("zsnr", [False, True])
def test_a_model_that_predicts_v(host, loaded, prompt, image, zsnr):
    (model,) = host.run("ModelSamplingDiscrete", model=loaded.model, sampling="v_prediction", zsnr=zsnr)
    assert error(host, model, prompt, image) < FOUND


def test_sdxl(host):
    """A model with a second text embedding and a U-Net of its own kind."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 64,
            "num_head_channels": 16,
            "use_linear_in_transformer": True,
            "use_spatial_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "legacy": False,
        }
    )
    torch.manual_seed(0)
    model = config.get_model({}, "")
    for weight in model.diffusion_model.parameters():
        torch.nn.init.normal_(weight, std=0.5 / max(weight[0].numel(), 4) ** 0.5)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)
    conditioning = [[torch.randn(1, 77, 64), {"pooled_output": torch.randn(1, 1280)}]]
    latent = {"samples": torch.randn(1, 4, *SIZE) / 0.13025}
    assert (
        error(host, patcher, conditioning, latent) < FOUND < error(host, patcher, conditioning, latent, refinements=0)
    )


def test_a_batch_is_inverted_row_by_row(host, loaded, prompt, image):
    samples = torch.cat([image["samples"], image["samples"].flip(-1), 0.5 * image["samples"]])
    together, _ = invert(host, loaded.model, prompt, {"samples": samples}, steps=10, refinements=1)
    for row, sample in zip(together["samples"], samples, strict=True):
        alone, _ = invert(host, loaded.model, prompt, {"samples": sample[None]}, steps=10, refinements=1)
        torch.testing.assert_close(row, alone["samples"][0], atol=1e-3 * row.std().item(), rtol=0)


def test_the_latent_keeps_its_noise_numbers_and_loses_its_mask(host, loaded, prompt, image):
    latent = {**image, "batch_index": [7], "noise_mask": torch.ones(1, 1, *SIZE)}
    before = latent["samples"].clone()
    inverted, _ = invert(host, loaded.model, prompt, latent, refinements=0)
    assert set(inverted) == {"samples", "batch_index", "blip_inverted_with_guidance"}
    assert inverted["blip_inverted_with_guidance"] is False
    assert set(latent) == {"samples", "batch_index", "noise_mask"}
    assert torch.equal(latent["samples"], before)


def test_progress_is_shown_and_cancelling_stops_it(host, loaded, prompt, image):
    import comfy.model_management as management
    import comfy.utils

    seen = []

    def hook(value, total, preview, **_):
        seen.append((value, total))
        if stop:
            management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        stop = False
        invert(host, loaded.model, prompt, image, steps=5, refinements=1)
        # Since 0.9.2 the host passes on the first update and the last, and those between as time goes by.
        assert (seen[0], seen[-1]) == ((1, 5), (5, 5))
        assert seen == sorted(seen)
        assert {total for _, total in seen} == {5}
        stop = True
        seen.clear()
        with pytest.raises(management.InterruptProcessingException):
            invert(host, loaded.model, prompt, image, steps=5, refinements=0)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert seen == [(1, 5)]


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (torch.ones(1, 16, 8, 8), "1 x 16 x 8 x 8, but this model reads rows x 4 x height x width: encode the picture"),
        (torch.ones(1, 4, 1, 8, 8), "1 x 4 x 1 x 8 x 8, but this model reads"),
        (torch.zeros(1, 4, 8, 8), "is empty, so there is no picture to invert: connect VAE Encode"),
        (torch.zeros(0, 4, 8, 8), "is empty, so there is no picture"),
        (torch.full((1, 4, 8, 8), float("nan")), "holds NaN or infinite numbers"),
    ],
)
def test_latents_that_are_no_picture_are_named(host, loaded, prompt, samples, sentence):
    with pytest.raises(ValueError, match=sentence):
        invert(host, loaded.model, prompt, {"samples": samples})


def test_a_model_that_mixes_image_and_noise_is_named(host, loaded, prompt, image):
    import comfy.model_sampling

    flow = SimpleNamespace(
        model=type("Flux", (), {})(), get_model_object={"model_sampling": comfy.model_sampling.CONST()}.get
    )
    with pytest.raises(ValueError, match="of the kind Flux, whose sampling throws the latent away.* use SD1.5"):
        invert(host, flow, prompt, image)
