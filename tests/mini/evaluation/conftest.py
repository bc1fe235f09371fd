"""An untrained model small enough to draw in no time."""

import pytest

from blip_qformer.pipeline.pipeline import new_pipeline
from tests import tiny


@pytest.fixture(scope="session")
def tiny_parts():
    pipeline = new_pipeline(tiny.SIZES, seed=0)
    for network in pipeline.networks.values():
        network.eval().requires_grad_(False)
    return pipeline
