"""The whole path: a picture and a word go in, pictures of that thing come out of a real ComfyUI.

``make demo`` takes the small model that lies in this repository and draws one thing in four places, in one row;
``make demo ARGS="--checkpoint FOLDER"`` draws a photograph's subject with real weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from tools.host import ROOT, ComfyServer, History, Prompt, ServerError, WorkflowError, make_base_directory
from tools.workflow import WorkflowFormatError, override, to_prompt

OUTPUT = ROOT / "output"
WORKFLOW = ROOT / "workflows" / "subject-generation.json"
LOADERS = ("BLIPDiffusionLoader", "BLIPDiffusionQFormerLoader")

#: The small model, something that it has never seen, and where to draw it.
SMALL_MODEL = ROOT / "mini" / "model"
GIVEN, WORD = ROOT / "mini" / "inputs" / "buoy.png", "buoy"
CONTEXTS = ("in the snow", "on the grass", "on the beach", "at night")
EDGE = 256
ROW = "demo.png"


def draw_row(given: Path = GIVEN, word: str = WORD) -> Path:
    """Draw one thing in four places with the small model, by the workflow that people open first.

    Args:
        given: a picture of the thing.
        word: what it is.

    Returns:
        The given picture and the four drawn ones in a row, in ``output/``.
    """
    base = make_base_directory(OUTPUT / "demo")
    shutil.copy(given, base / "input" / given.name)
    name = place_checkpoint(base / "models" / "blip_diffusion", SMALL_MODEL)
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    print("Starting ComfyUI ...")
    pictures = [Image.open(given)]
    with ComfyServer(base) as server:
        prompt = to_prompt(graph, server.object_info())
        for node, inputs in {
            "BLIPDiffusionLoader": {"checkpoint": name},
            "LoadImage": {"image": given.name},
            "BLIPDiffusionSubjectEncode": {"subject_word": word},
            "CLIPTextEncode": {"text": ""},  # the small model has not learned what "low quality" looks like
            "EmptyLatentImage": {"width": EDGE, "height": EDGE},
            "KSampler": {"steps": 20, "cfg": 4.0},
        }.items():
            prompt = override(prompt, node, **inputs)
        for context in CONTEXTS:
            asked = override(prompt, "BLIPDiffusionPromptCompose", prompt=context, prompt_strength=0.2)
            (picture,) = saved_pictures(_queue_with_bar(server, asked), base)
            pictures.append(Image.open(picture))
    in_a_row(pictures, EDGE).save(OUTPUT / ROW)
    return OUTPUT / ROW


def run_workflow(workflow: Path, checkpoint: Path) -> list[Path]:
    """Run a saved workflow on the sample photographs.

    Args:
        workflow: A workflow as the browser saves it.
        checkpoint: BLIP-Diffusion weights, a folder or a file.

    Returns:
        The pictures it drew, in ``output/``.
    """
    if not workflow.is_file():
        raise FileNotFoundError(f"No workflow is at '{workflow}': name a .json that the browser saved.")
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    base = make_base_directory(OUTPUT / "demo")
    for photograph in sorted((ROOT / "workflows" / "inputs").iterdir()):
        shutil.copy(photograph, base / "input")
    name = place_checkpoint(base / "models" / "blip_diffusion", checkpoint)
    print("Starting ComfyUI ...")
    with ComfyServer(base) as server:
        prompt = to_prompt(graph, server.object_info())
        for loader in LOADERS:
            if any(node["class_type"] == loader for node in prompt.values()):
                prompt = override(prompt, loader, checkpoint=name)
        history = _queue_with_bar(server, prompt)
    return [Path(shutil.copy(picture, OUTPUT / picture.name)) for picture in saved_pictures(history, base)]


def main() -> int:
    """Parse the command line, run the demo, and say where the picture is; 0 when there is one."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="real BLIP-Diffusion weights, instead of the small model")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="what to run with them")
    chosen = parser.parse_args()
    try:
        pictures = run_workflow(chosen.workflow, chosen.checkpoint) if chosen.checkpoint else [draw_row()]
    except (ServerError, WorkflowError, WorkflowFormatError, OSError, json.JSONDecodeError) as problem:
        print(f"The demo failed: {problem}", file=sys.stderr)
        return 1
    if not pictures:
        print(f"The demo failed: '{chosen.workflow}' saves no picture, add a Save Image node.", file=sys.stderr)
        return 1
    for picture in pictures:
        print(picture)
    if not chosen.checkpoint:
        print(f"Left: the {WORD} that was given. Then: that {WORD} {', '.join(CONTEXTS)}, by the small model in mini/.")
    return 0


def in_a_row(pictures: Sequence[Image.Image], height: int, gap: int = 0) -> Image.Image:
    """Pictures beside each other, all scaled to one height; white lies between them where there is a gap."""
    scaled = [
        picture.convert("RGB").resize(
            (round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS
        )
        for picture in pictures
    ]
    row = Image.new("RGB", (sum(each.width + gap for each in scaled) - gap, height), "white")
    left = 0
    for picture in scaled:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def place_checkpoint(models: Path, checkpoint: Path) -> str:
    """Put the weights where the loader looks, and return the name they have in its list."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"No checkpoint is at '{checkpoint}': name a BLIP-Diffusion folder or file.")
    placed = models / checkpoint.name
    placed.unlink(missing_ok=True)
    placed.symlink_to(checkpoint.resolve())
    return placed.name


def saved_pictures(history: History, base: Path) -> list[Path]:
    """What a run's Save Image nodes wrote."""
    return [file for files in history.files.values() for file in files if base / "output" in file.parents]


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
