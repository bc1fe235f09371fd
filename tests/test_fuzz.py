"""Damaged files of every kind give one sentence: the first of those that `make fuzz` reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_damaged_files_give_one_sentence():
    """In processes of their own, as a file may end one; what is printed names each case, to be read again."""
    command = [sys.executable, "-m", "tools.fuzz", "--count", os.environ.get("FUZZ_COUNT", "1500")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
