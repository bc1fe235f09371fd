"""The whole path once: a photograph and a word go in, a picture comes out of a real ComfyUI.

Run by ``make demo``; ``make demo ARGS="--checkpoint FOLDER"`` uses real weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.random_weights import build_demo_checkpoint
from tools.host import ROOT, ComfyServer, History, Prompt, ServerError, WorkflowError, comfyui_path, make_base_directory
from tools.workflow import WorkflowFormatError, override, to_prompt

OUTPUT = ROOT / "output"
LOADERS = ("BLIPDiffusionLoader", "BLIPDiffusionQFormerLoader")


def run_demo(workflow: Path, checkpoint: Path | None = None) -> list[Path]:
    """Run a saved workflow on the sample photographs.

    Args:
        workflow: A workflow as the browser saves it.
        checkpoint: BLIP-Diffusion weights, a folder or a file; None makes small random ones.

    Returns:
        The pictures it drew, in ``output/``.
    """
    if not workflow.is_file():
        raise FileNotFoundError(f"No workflow is at '{workflow}': name a .json that the browser saved.")
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    base = make_base_directory(OUTPUT / "demo")
    for photograph in sorted((ROOT / "workflows" / "inputs").iterdir()):
        shutil.copy(photograph, base / "input")
    name = _place_checkpoint(base / "models" / "blip_diffusion", checkpoint)
    print("Starting ComfyUI ...")
    with ComfyServer(base) as server:
        prompt = to_prompt(graph, server.object_info())
        for loader in LOADERS:
            if any(node["class_type"] == loader for node in prompt.values()):
                prompt = override(prompt, loader, checkpoint=name)
        history = _queue_with_bar(server, prompt)
    pictures = [file for files in history.files.values() for file in files if base / "output" in file.parents]
    return [Path(shutil.copy(picture, OUTPUT / picture.name)) for picture in pictures]


def main() -> int:
    """Parse the command line, run the demo, and say where the picture is; 0 when there is one."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--workflow", type=Path, default=ROOT / "workflows" / "subject-generation.json")
    parser.add_argument("--checkpoint", type=Path, help="real BLIP-Diffusion weights, instead of small random ones")
    chosen = parser.parse_args()
    try:
        pictures = run_demo(chosen.workflow, chosen.checkpoint)
    except (ServerError, WorkflowError, WorkflowFormatError, OSError, json.JSONDecodeError) as problem:
        print(f"The demo failed: {problem}", file=sys.stderr)
        return 1
    if not pictures:
        print(f"The demo failed: '{chosen.workflow}' saves no picture, add a Save Image node.", file=sys.stderr)
        return 1
    for picture in pictures:
        print(picture)
    if chosen.checkpoint is None:
        print(
            "The weights are small random ones made on the spot: the picture is noise, the path that drew it is real."
        )
    return 0


def _place_checkpoint(models: Path, checkpoint: Path | None) -> str:
    """Put the weights where the loader looks, and return the name they have in its list."""
    if checkpoint is None:
        return build_demo_checkpoint(models / "demo-random-weights", comfyui_path()).name
    if not checkpoint.exists():
        raise FileNotFoundError(f"No checkpoint is at '{checkpoint}': name a BLIP-Diffusion folder or file.")
    placed = models / checkpoint.name
    placed.unlink(missing_ok=True)
    placed.symlink_to(checkpoint.resolve())
    return placed.name


def _queue_with_bar(server: ComfyServer, prompt: Prompt) -> History:
    """Queue the prompt; the bar shows the node at work and, where it tells, its steps."""
    with tqdm(unit="step") as bar:
        at_work = ""

        def show(kind: str, data: dict[str, Any]) -> None:
            nonlocal at_work
            if kind == "executing" and data["node"] is not None:
                bar.set_description(prompt[data["node"]]["_meta"]["title"])
            elif kind == "progress":
                if data["node"] != at_work:
                    at_work = data["node"]
                    bar.reset(total=data["max"])
                bar.update(data["value"] - bar.n)

        return server.queue(prompt, on_event=show)


if __name__ == "__main__":
    sys.exit(main())
