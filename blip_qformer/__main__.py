"""`python -m blip_qformer` in the pack's folder, or `python path/to/blip_qformer` from anywhere."""

import sys
from pathlib import Path

if not __package__:  # run by its path, as ComfyUI portable's Python must be
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from .cli.command_line import main

sys.exit(main())
