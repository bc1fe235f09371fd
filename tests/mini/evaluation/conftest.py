"""An untrained model small enough to sample from in no time."""

import pytest

from blip_qformer.pipeline import new_pipeline
from mini.init import initialise
from tests import tiny


@pytest.fixture(scope="session")
def tiny_pipeline():
    pipeline = new_pipeline(tiny.SIZES, seed=0, initialise=initialise)
    for network in pipeline.networks.values():
        network.eval().requires_grad_(False)
    return pipeline
