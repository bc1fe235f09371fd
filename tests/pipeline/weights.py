"""Weights of a whole model, and how two of them are compared."""

from __future__ import annotations

import torch

from blip_qformer.pipeline import Pipeline


def weights_of(model: Pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": weight
        for name, network in model.networks.items()
        for key, weight in network.state_dict().items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
