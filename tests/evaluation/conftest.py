"""An untrained model small enough to draw in no time."""

import pytest

from blip_qformer.training.parts import new_parts
from tests import tiny


@pytest.fixture(scope="session")
def tiny_parts():
    parts = new_parts(tiny.SIZES, seed=0)
    for network in parts.networks.values():
        network.eval().requires_grad_(False)
    return parts
