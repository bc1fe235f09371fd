"""``make demo``: a picture comes out, and what it says about it is true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.random_weights import build_demo_checkpoint
from tools.demo import CONTEXTS, EDGE, WORD
from tools.host import OFFLINE, ROOT, comfyui_path


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.demo", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=900)


def test_demo_draws_a_thing_in_four_places_and_says_what_it_is():
    done = demo()
    assert done.returncode == 0, done.stderr
    *_, row, remark = done.stdout.splitlines()
    assert Path(row).parent == ROOT / "output"
    assert Image.open(row).size == (5 * EDGE, EDGE)
    tiles = [np.asarray(Image.open(row).crop((EDGE * each, 0, EDGE * (each + 1), EDGE))) / 255 for each in range(5)]
    below = {place: tile[-EDGE // 8 :].mean(axis=(0, 1)) for place, tile in zip(CONTEXTS, tiles[1:], strict=True)}
    assert below["on the grass"].argmax() == 1  # green
    assert below["in the snow"].mean() > 0.7 > 0.3 > below["at night"].mean()
    given, *drawn = (is_orange(tile) for tile in tiles)
    for each in drawn:  # a ring where there is one in the given picture, with a hole in it
        assert (given & each).sum() > 0.35 * (given | each).sum()
        assert each[120:160, 110:146].mean() < 0.3
    assert remark.startswith(f"Left: the {WORD} that was given.")
    assert "KSampler" in done.stderr  # the progress bar


def is_orange(picture: np.ndarray) -> np.ndarray:
    """Where a picture [H, W, 3] in 0..1 has the life ring's colour."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    return (red > 0.7) & (green < 0.4) & (blue < 0.3)


def test_demo_runs_a_workflow_with_weights_of_ones_own(tmp_path):
    weights = build_demo_checkpoint(tmp_path / "own", comfyui_path())
    done = demo("--checkpoint", str(weights))
    assert done.returncode == 0, done.stderr
    picture = done.stdout.splitlines()[-1]
    assert Image.open(picture).size == (512, 512)
    assert Path(picture).parent == ROOT / "output"


def test_demo_says_what_is_wrong():
    done = demo("--checkpoint", "/nowhere")
    assert done.returncode == 1
    assert "No checkpoint is at '/nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
