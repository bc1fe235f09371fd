"""Networks of SD1.5's sizes come from the host's own loaders, and are what our builder makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import oracle

#: SD1.5's widths, by which the host knows it, with fewer levels.
SHALLOW = dataclasses.replace(oracle.FULL, unet_channels=(320, 640), unet_attention=(True, False), unet_layers=1)


@pytest.fixture(scope="module")
def networks(host):
    return host.module("nodes.host.networks")


@pytest.fixture
def host_loads(networks, monkeypatch) -> list[str]:
    """Names of the host's loaders that were called."""
    called = []

    def recorded(name: str, loader: Callable) -> Callable:
        def load(state_dict):
            called.append(name)
            return loader(state_dict)

        return load

    for owner, name in (
        (networks.comfy.sd, "load_diffusion_model_state_dict"),
        (networks.comfy.controlnet, "load_controlnet_state_dict"),
    ):
        monkeypatch.setattr(owner, name, recorded(name, getattr(owner, name)))
    return called


@pytest.fixture(scope="module")
def shallow() -> dict[str, nn.Module]:
    return {"unet": oracle.unet(SHALLOW), "controlnet": oracle.controlnet(SHALLOW)}


def component(host, network: nn.Module, **config):
    return host.module("blip_qformer.checkpoint").Component(
        Path("here"), {**network.config, **config}, network.state_dict
    )


def build(host, networks, name: str, shallow, **config):
    built = component(host, shallow[name], **config)
    if name == "controlnet":
        return networks.build_controlnet(built)
    return networks.build_model(built, component(host, shallow["unet"], scaling_factor=0.25))


def network_of(built) -> nn.Module:
    """The module inside a MODEL or a CONTROL_NET."""
    return built.control_model if hasattr(built, "control_model") else built.model.diffusion_model


def outputs(built) -> list[Tensor]:
    network, generator = network_of(built), torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 77, 768, generator=generator)
    hint = {"hint": torch.rand(1, 3, 64, 64, generator=generator)} if hasattr(built, "control_model") else {}
    found = network(latents, timesteps=torch.tensor([500]), context=context, **hint)
    return list(found["output"]) + list(found["middle"]) if hint else [found]


@pytest.mark.parametrize(
    ("name", "loader"),
    [("unet", "load_diffusion_model_state_dict"), ("controlnet", "load_controlnet_state_dict")],
)
def test_the_hosts_loader_and_our_builder_make_the_same(host, networks, shallow, host_loads, monkeypatch, name, loader):
    by_host = build(host, networks, name, shallow)
    assert host_loads == [loader]
    monkeypatch.setattr(networks, "_is_known_to_host", lambda *_: False)
    by_us = build(host, networks, name, shallow)
    assert host_loads == [loader]
    ours = dict(network_of(by_us).named_parameters())
    for key, weight in network_of(by_host).named_parameters():
        assert torch.equal(weight, ours.pop(key)), key
    assert not ours
    patchers = [each.control_model_wrapped if name == "controlnet" else each for each in (by_host, by_us)]
    for attribute in ("load_device", "offload_device"):
        assert len({getattr(each, attribute) for each in patchers}) == 1
    assert len({getattr(each, "manual_cast_dtype", None) for each in (by_host, by_us)}) == 1
    for found, expected in zip(outputs(by_host), outputs(by_us), strict=True):
        assert torch.equal(found, expected)


def test_the_vaes_scaling_is_kept(host, networks, shallow, host_loads):
    assert build(host, networks, "unet", shallow).model.latent_format.scale_factor == 0.25
    assert host_loads


@pytest.mark.parametrize("name", ["unet", "controlnet"])
def test_other_sizes_are_built_here(host, networks, shallow, host_loads, name):
    """The host takes the number of heads for SD1.5's, which no shape tells."""
    built = build(host, networks, name, shallow, attention_head_dim=4)
    assert not host_loads
    assert {module.heads for module in network_of(built).modules() if hasattr(module, "to_q")} == {4}


def test_the_hosts_loaders_leave_the_weights_as_they_were(host, networks, shallow, host_loads):
    before = {name: {key: value.clone() for key, value in net.state_dict().items()} for name, net in shallow.items()}
    for name, network in shallow.items():
        build(host, networks, name, shallow)
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[name][key]), key
    assert len(host_loads) == 2
