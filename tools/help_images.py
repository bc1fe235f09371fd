"""Make the images of the help pages: each node in a workflow, as the page shows it, and what the workflow makes.

``python -m tools.help_images`` opens the workflows in a real ComfyUI and a real browser, with the small model in place
of the published one, and writes ``web/docs/images``. What a workflow makes is its thumbnail, which ``python -m
tools.thumbnails`` samples.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from blip_qformer.atomic import atomic_file
from tools.demo import SMALL_MODEL
from tools.frontend import Frontend
from tools.host import ROOT, ComfyServer, make_base_directory
from tools.thumbnails import CHANGES

IMAGES = ROOT / "web" / "docs" / "images"
WIDTH, QUALITY = 640, 80  # pixels; a help page is a column at the page's side

#: Workflow -> the nodes that it shows.
SHOWN = {
    "subject-generation": ("BLIPDiffusionLoader", "BLIPDiffusionSubjectEncode", "BLIPDiffusionPromptCompose"),
    "subject-generation-stock-loader": ("BLIPDiffusionQFormerLoader",),
    "subject-finetune": ("BLIPDiffusionSubjectFinetune", "BLIPDiffusionSubjectSave"),
    "edit-generated": ("BLIPDiffusionPromptToPrompt",),
    "edit-photo": ("BLIPDiffusionDDIMInversion",),
    "attention-reweight": (
        "BLIPDiffusionAttentionReweight",
        "BLIPDiffusionAttentionRecord",
        "BLIPDiffusionAttentionMap",
    ),
    "three-subjects": ("BLIPDiffusionSubjectRegions",),
    "subject-trajectory": ("BLIPDiffusionSubjectTrajectory", "BLIPDiffusionSubjectGrid"),
}


def main() -> int:
    """Write the images of the workflows that the command line names, all if it names none; return the exit code."""
    base = make_base_directory(ROOT / "output" / "help-images")
    model = base / "models" / "blip_diffusion" / "blipdiffusion"
    model.unlink(missing_ok=True)
    model.symlink_to(SMALL_MODEL)
    with ComfyServer(base) as server, Frontend(server) as page:
        for workflow in sys.argv[1:] or SHOWN:
            page.open_workflow(read_graph(workflow))
            for node in SHOWN[workflow]:
                _save(page.node_screenshot(base / "temp" / "node.png", node), node)
            if workflow in CHANGES:  # the small model can run it
                _save(ROOT / "workflows" / f"{workflow}.jpg", workflow)
    return 0


def read_graph(workflow: str) -> dict[str, Any]:
    """Read a workflow by its file's name without ``.json``."""
    return json.loads((ROOT / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))


def _save(source: Path, name: str) -> None:
    image = Image.open(source).convert("RGB")
    image.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    target = IMAGES / f"{name}.jpg"
    target.parent.mkdir(exist_ok=True)
    with atomic_file(target) as temporary:
        image.save(temporary, format="JPEG", quality=QUALITY, optimize=True)
    print(f"Wrote {target.relative_to(ROOT)} ({target.stat().st_size / 1000:.0f} kB).")


if __name__ == "__main__":
    raise SystemExit(main())
