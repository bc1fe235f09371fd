"""``make demo``: a picture comes out, and what it says about it is true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tools.host import OFFLINE, ROOT


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.demo", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=900)


def test_demo_leaves_a_picture_and_says_what_it_is():
    done = demo()
    assert done.returncode == 0, done.stderr
    *_, picture, remark = done.stdout.splitlines()
    assert Image.open(picture).size == (512, 512)
    assert Path(picture).parent == ROOT / "output"
    assert "the picture is noise, the path that drew it is real" in remark
    assert "KSampler" in done.stderr  # the progress bar


def test_demo_says_what_is_wrong():
    done = demo("--checkpoint", "/nowhere")
    assert done.returncode == 1
    assert "No checkpoint is at '/nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
