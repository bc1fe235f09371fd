"""Measure the peak memory of a piece of work in a process of its own: ``python -m benchmarks.memory``.

RssAnon is memory that the kernel cannot drop; VmHWM also counts the pages of mapped files that were read.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT


@dataclass(frozen=True)
class Cost:
    """The cost of one piece of work.

    Attributes:
        anonymous: Peak of RssAnon above its value before, in bytes.
        resident: Peak of VmHWM above its value before, in bytes.
        seconds: Time that it took.
    """

    anonymous: int
    resident: int
    seconds: float


def cost_in_own_process(work: str, *arguments: str | Path) -> Cost:
    """Measure one entry of :data:`WORK` in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", work, *map(str, arguments)]
    answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Cost(**json.loads(answer.splitlines()[-1]))


def measure(work: Callable[[], Any]) -> Cost:
    """Run a function while a thread polls the memory of this process."""
    _trim_heap()
    before = {field: _bytes(field) for field in ("RssAnon", "VmHWM")}
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], _bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    anonymous = max(peak[0], _bytes("RssAnon")) - before["RssAnon"]
    del result  # held until here, so that what it keeps is counted
    return Cost(anonymous, _bytes("VmHWM") - before["VmHWM"], seconds)


def _trim_heap() -> None:
    """Return freed memory to the kernel, or the work would reuse it without being counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _load_encoder(path: str) -> Callable[[], Any]:
    from blip_qformer import load_subject_encoder
    from blip_qformer.encoder import SubjectEncoder

    SubjectEncoder(device="meta")  # torch's own imports are not to be measured

    def work():
        encoder = load_subject_encoder(path)
        for weight in encoder.parameters():
            weight.sum()  # read every page
        return encoder

    return work


def _load_through_host(path: str) -> Callable[[], Any]:
    from blip_qformer.encoder import SubjectEncoder
    from tests.host import load_host

    SubjectEncoder(device="meta")
    host = load_host(Path(tempfile.mkdtemp(dir=Path(path).parent)))
    link = host.base / "models" / "blip_diffusion" / "full"
    link.symlink_to(path, target_is_directory=True)
    return lambda: host.run("BLIPDiffusionLoader", checkpoint=link.name)


def _encode_views(path: str, views: str) -> Callable[[], Any]:
    import torch

    from tests.host import load_host

    host = load_host(Path(tempfile.mkdtemp(dir=Path(path).parent)))
    link = host.base / "models" / "blip_diffusion" / Path(path).name
    link.symlink_to(path)
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint=link.name)
    inputs = {"qformer": qformer, "subject_word": "dog"}
    host.run("BLIPDiffusionSubjectEncode", image=torch.rand(1, 512, 512, 3), **inputs)  # set-up of the first run
    return lambda: host.run("BLIPDiffusionSubjectEncode", image=torch.rand(int(views), 512, 512, 3), **inputs)


def _convert(source: str, target: str, dtype: str) -> Callable[[], Any]:
    from blip_qformer.cli import command_line as cli

    def work():
        if cli.main(["convert", source, target, "--dtype", dtype]) != 0:
            raise RuntimeError("blip-qformer convert failed; its own message stands above.")

    return work


def _edit_attention(way: str, edge: str) -> Callable[[], Any]:
    from benchmarks.editing import attention_work

    return attention_work(way, int(edge))


def _finetune(way: str) -> Callable[[], Any]:
    from benchmarks.finetune import one_way

    return one_way(way)


def _bytes(field: str) -> int:
    """Return a field of this process's status, such as ``VmHWM``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


#: Functions by name that prepare, unmeasured, and return the work to measure.
WORK = {
    "load encoder": _load_encoder,
    "load through host": _load_through_host,
    "encode views": _encode_views,
    "convert": _convert,
    "edit attention": _edit_attention,
    "finetune": _finetune,
}

if __name__ == "__main__":
    print(json.dumps(asdict(measure(WORK[sys.argv[1]](*sys.argv[2:])))))
