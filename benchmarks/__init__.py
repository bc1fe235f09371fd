"""Speed and accuracy side by side with a peer, in one process, on the same weights.

As in the tests, the root must be off ``sys.path`` before a host is imported, or our ``nodes`` would hide its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tests  # found through the root; their modules stay importable after the root is removed
import tools

__all__ = ["ROOT", "tests", "tools"]

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
