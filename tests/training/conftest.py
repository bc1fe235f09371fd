"""Pairs to train on, and processes to train in."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> str:
    """A folder of pairs in four shards."""
    return str(tiny.write_pairs(tmp_path_factory.mktemp("pairs") / "pairs"))


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Starts processes in no time: all come from one that has imported training already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blip_qformer.training.trainer"])
    return context


@pytest.fixture(autouse=True)
def fresh_accelerate():
    tiny.reset_accelerate()
    yield
    tiny.reset_accelerate()
