"""Loading a subject encoder never holds its weights twice. Measured in a process of its own, where nothing else is.

What is measured is memory that a process cannot give back (RssAnon). The pages of the file that weights are copied from
are the system's cache, there with any way of reading.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip_qformer.checkpoint import save_qformer
from blip_qformer.checkpoint.layouts.hub import KEY_MAP
from blip_qformer.encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig

CONFIG = SubjectEncoderConfig(
    vision=VisionConfig(width=512, layers=12, heads=8, feed_forward_width=2048),
    qformer=QFormerConfig(width=512, layers=6, heads=8, feed_forward_width=2048),
    projection_width=2048,
)

LOAD_AND_MEASURE = """
import json, sys, threading, torch
from blip_qformer import load_subject_encoder
from blip_qformer.encoder import SubjectEncoder

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

SubjectEncoder(device="meta")  # what torch itself loads to build without memory is not what is measured
before = kilobytes("RssAnon")
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], kilobytes("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
encoder = load_subject_encoder(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
for weight in encoder.parameters():
    weight.sum()  # read every page
done.set(); watcher.join()
print(json.dumps((max(peak[0], kilobytes("RssAnon")) - before) * 1024))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same 250 MB of weights as a Hub folder's pickle and as our file."""
    folder = tmp_path_factory.mktemp("memory")
    weights = SubjectEncoder(CONFIG).state_dict()
    save_qformer(folder / "qformer.safetensors", weights, CONFIG, dtype=None)
    (folder / "hub" / "qformer").mkdir(parents=True)
    torch.save(KEY_MAP.to_file(weights), folder / "hub" / "qformer" / "pytorch_model.bin")
    config = {
        "vision_config": {"num_attention_heads": 8, "hidden_act": "quick_gelu"},
        "qformer_config": {"num_attention_heads": 8, "cross_attention_frequency": 1},
    }
    (folder / "hub" / "qformer" / "config.json").write_text(json.dumps(config))
    return {"safetensors": folder / "qformer.safetensors", "pickle": folder / "hub"}


@pytest.mark.parametrize("format", ["safetensors", "pickle"])
def test_peak_memory_is_the_weights(files, format):
    size = files["safetensors"].stat().st_size
    assert measure(files[format], "float32") < 1.1 * size


@pytest.mark.parametrize("format", ["safetensors", "pickle"])
def test_casting_holds_only_the_cast_weights(files, format):
    size = files["safetensors"].stat().st_size
    assert measure(files[format], "float16") < 1.2 * size / 2


def measure(path: Path, dtype: str) -> int:
    """Bytes that loading added, at their peak."""
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(path), dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
