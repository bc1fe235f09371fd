"""source_unguided: every sampler of the host, with what comes of an inverted photograph."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.nodes.attention.graphs import SOURCE, close, inserted, pair, sample_without_noise
from tools.host_versions import NEWER_NODES, NEWER_SAMPLERS

STEPS = 40
FOUND = 0.2  # of the photograph's spread: the error with which every deterministic sampler finds it again

EXACT, NOISE, NEGATIVE = None, "adds or takes away noise of its own", "steps by the negative prompt's prediction"

#: By the definition of each: the ODE's solvers, those that add noise, and those that step by the negative (cfg++).
SAMPLERS = {
    **dict.fromkeys(["ddim", "euler", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "lms", "dpm_fast"], EXACT),
    **dict.fromkeys(["dpm_adaptive", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep"], EXACT),
    **dict.fromkeys(["gradient_estimation", "uni_pc", "uni_pc_bh2"], EXACT),
    **dict.fromkeys(["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "res_multistep_ancestral"], NOISE),
    **dict.fromkeys(["dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun"], NOISE),
    **dict.fromkeys(["dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "exp_heun_2_x0_sde"], NOISE),
    **dict.fromkeys(["ddpm", "lcm", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece"], NOISE),
    **dict.fromkeys(["euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "res_multistep_ancestral_cfg_pp"], NOISE),
    **dict.fromkeys(
        ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"], NEGATIVE
    ),
}

#: Nodes that make a SAMPLER: the same ones are exact or not by their settings.
SAMPLER_NODES = [
    ("SamplerEulerAncestral", {"eta": 0.0}, EXACT),
    ("SamplerEulerAncestral", {"eta": 1.0}, NOISE),
    ("SamplerEulerAncestral", {"eta": 1.0, "s_noise": 0.0}, NOISE),
    ("SamplerDPMPP_2S_Ancestral", {"eta": 0.0}, EXACT),
    ("SamplerDPMPP_SDE", {"eta": 0.0, "noise_device": "cpu"}, EXACT),
    ("SamplerDPMPP_SDE", {"eta": 0.5, "noise_device": "cpu"}, NOISE),
    ("SamplerDPMPP_2M_SDE", {"eta": 0.0, "solver_type": "midpoint", "noise_device": "cpu"}, EXACT),
    ("SamplerDPMPP_3M_SDE", {"eta": 0.0, "noise_device": "cpu"}, EXACT),
    ("SamplerLMS", {}, EXACT),
    ("SamplerDPMAdaptative", {}, EXACT),
    ("SamplerDPMAdaptative", {"eta": 1.0}, NOISE),
    ("SamplerER_SDE", {"solver_type": "ODE"}, EXACT),
    ("SamplerER_SDE", {"solver_type": "ER-SDE"}, NOISE),
    ("SamplerSASolver", {"eta": 0.0}, EXACT),
    ("SamplerSASolver", {}, NOISE),
    ("SamplerSEEDS2", {"eta": 0.0, "solver_type": "phi_1"}, EXACT),
    ("SamplerSEEDS2", {"solver_type": "phi_1"}, NOISE),
    ("SamplerLCMUpscale", {}, NOISE),
    ("SamplerEulerCFGpp", {"version": "regular"}, NEGATIVE),
]


def gaussian(model):
    """A copy of a MODEL that draws from normal distributions, of which the prediction is known: no network is rough.

    For N(mean, 1) it is mean + (x - mean) / (1 + sigma ** 2); the negative's distribution is another one.
    """

    def predict(function, arguments):
        x, sigma = arguments["input"], arguments["timestep"].reshape(-1, 1, 1, 1)
        sides = arguments["cond_or_uncond"]
        means = torch.tensor([3.0 * side for side in sides]).repeat_interleave(len(x) // len(sides))
        means = means.to(x).reshape(-1, 1, 1, 1)
        return means + (x - means) / (1 + sigma**2)

    model = model.clone()
    model.set_model_unet_function_wrapper(predict)
    return model


@pytest.fixture(scope="module")
def known(host, small):
    """What the samplers get, with a model of known predictions."""
    return SimpleNamespace(model=gaussian(small.model), clip=small.clip, subject=small.subject, negative=small.negative)


@pytest.fixture(scope="module")
def photograph(host, known):
    """A smooth latent, its source, its inverted latent, and the group that is sampled from it with source_unguided."""
    coarse = torch.randn(1, 4, 3, 4, generator=torch.manual_seed(0))
    samples = torch.nn.functional.interpolate(coarse, size=(8, 12), mode="bicubic") / 0.18215
    source, edited = inserted(host, known)
    inputs = {"model": known.model, "conditioning": source, "latent": {"samples": samples}}
    inverted, _ = host.run("BLIPDiffusionDDIMInversion", **inputs, steps=STEPS, refinements=5)
    group = pair(host, known, source, edited, inverted, (SOURCE, ""), source_unguided=True)
    return samples, source, inverted, group


def error(found, photograph) -> float:
    """Distance in units of the photograph's spread."""
    return ((found - photograph).square().mean().sqrt() / photograph.std()).item()


def tolerance_of(name) -> float:
    """Of equality with the source alone; an adaptive sampler chooses its steps for all pictures of a batch together."""
    return 0.1 if name in ("dpm_adaptive", "SamplerDPMAdaptative") else 1e-3


def skip_where_unknown(name):
    """Skip a sampler that this version of the host does not have: it would take euler."""
    import comfy.samplers

    if name in NEWER_SAMPLERS and name not in comfy.samplers.SAMPLER_NAMES:
        pytest.skip(f"{name} came in {NEWER_SAMPLERS[name]}")


def test_the_table_has_every_sampler_of_the_host(host):
    import comfy.samplers

    assert {*comfy.samplers.SAMPLER_NAMES} <= {*SAMPLERS}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_finds_the_photograph_or_is_refused(host, known, photograph, name):
    """It is refused if, and only if, what it draws from the inverted latent is another picture."""
    skip_where_unknown(name)
    samples, source, inverted, group = photograph
    settings = {"sampler_name": name, "steps": STEPS}
    alone = sample_without_noise(host, known, source, inverted, cfg=1.0, **settings)
    if SAMPLERS[name] is EXACT:
        assert error(alone, samples) < FOUND
        found = sample_without_noise(host, known, *group, **settings)[:1]
        assert error(found, samples) < FOUND
        close(found, alone, tolerance_of(name))
    else:
        with pytest.raises(ValueError, match=f"{name} {SAMPLERS[name]}, .*choose ddim, or switch source_unguided off"):
            sample_without_noise(host, known, *group, **settings)
        assert error(alone, samples) > FOUND


@pytest.mark.parametrize("name", [name for name, outcome in SAMPLERS.items() if outcome is EXACT])
def test_with_a_network_the_source_is_what_the_sampler_draws_of_it_alone(host, small, name):
    skip_where_unknown(name)
    source, edited = inserted(host, small)
    start = {"samples": 5 * torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))}
    group = pair(host, small, source, edited, start, (SOURCE, ""), source_unguided=True)
    settings = {"sampler_name": name, "steps": 4}
    alone = sample_without_noise(host, small, source, start, cfg=1.0, **settings)
    close(sample_without_noise(host, small, *group, **settings)[:1], alone, tolerance_of(name))


@pytest.mark.parametrize(("node", "settings", "outcome"), SAMPLER_NODES)
def test_a_sampler_node_is_judged_by_its_settings(host, known, photograph, node, settings, outcome):
    if node in NEWER_NODES and node not in host.nodes:
        pytest.skip(f"{node} came in {NEWER_NODES[node]}")
    samples, source, inverted, group = photograph
    if "model" in host.nodes[node].INPUT_TYPES()["required"]:
        settings = {**settings, "model": known.model}
    (sampler,) = host.run(node, **settings)
    (sigmas,) = host.run("BasicScheduler", model=known.model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)
    inputs = {"model": known.model, "add_noise": False, "noise_seed": 0, "sampler": sampler, "sigmas": sigmas}

    def sample(positive, latent, cfg):
        return host.run(
            "SamplerCustom", **inputs, positive=positive, negative=known.negative, latent_image=latent, cfg=cfg
        )[0]["samples"]

    if outcome is EXACT:
        found = sample(*group, 4.0)
        close(found[:1], sample(source, inverted, 1.0), tolerance_of(node))
        assert error(found[:1], samples) < FOUND
    else:
        with pytest.raises(ValueError, match=outcome):
            sample(*group, 4.0)


def test_a_sampler_is_refused_before_any_work(host, known, photograph):
    """The model is not called, and its trial run takes no random numbers from those of others."""
    _, _, _, group = photograph
    calls = []
    model = known.model.clone()
    model.set_model_unet_function_wrapper(lambda function, arguments: calls.append(arguments))
    (sampler,) = host.run("KSamplerSelect", sampler_name="seeds_2")
    (sigmas,) = host.run("BasicScheduler", model=model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)
    inputs = {"model": model, "add_noise": False, "noise_seed": 0, "sampler": sampler, "sigmas": sigmas, "cfg": 4.0}
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"seeds_2 adds or takes away noise"):
        host.run("SamplerCustom", **inputs, positive=group[0], negative=known.negative, latent_image=group[1])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert calls == []


def test_a_sampler_that_cannot_be_tried_is_refused(host, known, photograph):
    import comfy.samplers

    def own(model, x, sigmas, extra_args, callback, disable):
        raise KeyError("of another pack")

    _, _, _, group = photograph
    (sigmas,) = host.run("BasicScheduler", model=known.model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)
    inputs = {"model": known.model, "add_noise": False, "noise_seed": 0, "sigmas": sigmas, "cfg": 4.0}
    inputs["sampler"] = comfy.samplers.KSAMPLER(own)
    with pytest.raises(ValueError, match=r"own failed in a trial run \('of another pack'\)"):
        host.run("SamplerCustom", **inputs, positive=group[0], negative=known.negative, latent_image=group[1])
