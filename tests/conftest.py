"""Fixtures that bring up the real ComfyUI: in this process, as a server, and in a browser.

The root is taken off ``sys.path``, where our ``nodes`` package would hide the host's module of that name; what the
tests import from the root is put in place by name. No folder of tests has an ``__init__.py``: pytest would follow them
up to the pack's own and import that without a host.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parent.parent

# One thread for each process, those that tests start included: `make test` runs two, and threads of several processes
# that wait for each other on two cores take many times as long. Read when torch is imported, hence first. Numba (in
# pymatting) would give torch's OpenMP as many threads as there are cores again.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
os.environ.update(dict.fromkeys(THREADS, "1"))


def _import_from_root(name: str) -> None:
    """Import one package of the root without the root being on ``sys.path``."""
    spec = importlib.machinery.PathFinder.find_spec(name, [str(ROOT)])
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)


sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
for package in ("tools", "tests", "benchmarks", "mini"):
    if package not in sys.modules:
        _import_from_root(package)

from tests.host import Host, load_host  # noqa: E402
from tools.frontend import RENDERERS, Frontend, NoRendererError  # noqa: E402
from tools.host import OFFLINE, ComfyServer, make_base_directory  # noqa: E402

os.environ.update(OFFLINE)

# No test asserts on time, and a failure is not explained: tracing each line makes all that follows many times slower.
settings.register_profile("suite", deadline=None, phases=[phase for phase in Phase if phase is not Phase.explain])
settings.load_profile("suite")


#: Files that take longest begin first, so that the two processes of `make test` end together.
LONGEST = (
    "tests/test_workflows.py",
    "tests/test_first_minutes.py",
    "tests/test_demo.py",
    "tests/test_readme.py",
    "tests/data/test_photographs.py",
    "tests/training/test_distributed.py",
    "tests/checkpoint/test_loading_memory.py",
    "tests/data/test_prepare.py",
    "tests/training/test_checkpointing.py",
    "tests/nodes/test_inversion.py",
)

#: Files that share the session's server and browser, and hence a process.
ON_SERVER = (
    "tests/nodes/test_texts.py",
    "tests/test_host.py",
    "tests/test_locales.py",
    "tests/test_soak.py",
    "tests/test_workflow.py",
    "tests/test_workflows.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    order = {file: index for index, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests out by file, and those that use the server as if they were one."""
    from xdist.scheduler import LoadFileScheduling  # a run in one process does without it

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "server" if file in ON_SERVER else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """ComfyUI with the pack, imported into this process, in float32."""
    return load_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack, as users have it."""
    with ComfyServer(make_base_directory(tmp_path_factory.mktemp("server"))) as running:
        yield running


@pytest.fixture(scope="session")
def frontends(server: ComfyServer) -> Iterator[Callable[[str], Frontend]]:
    """The server's frontend in a headless browser, by the renderer of its nodes; each is opened once."""
    with ExitStack() as opened:
        yield functools.cache(lambda renderer: opened.enter_context(Frontend(server, renderer)))


@pytest.fixture
def frontend(frontends: Callable[[str], Frontend]) -> Frontend:
    """The frontend with nodes on the canvas."""
    return frontends(RENDERERS[0])


@pytest.fixture(params=RENDERERS)
def page(frontends: Callable[[str], Frontend], request: pytest.FixtureRequest) -> Frontend:
    """The frontend with each of its renderers."""
    try:
        return frontends(request.param)
    except NoRendererError as error:
        pytest.skip(str(error))
