"""The whole path in a real ComfyUI: an image and a word go in, images of that thing come out.

``make demo`` runs the small model of this repository: one thing in four contexts, in one row. ``make demo
ARGS="--checkpoint FOLDER"`` runs a workflow on a photograph with real weights.
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

from blip_qformer.atomic import atomic_file
from tools.host import ROOT, ComfyServer, History, Prompt, ServerError, WorkflowError, make_base_directory
from tools.workflow import WorkflowFormatError, override, to_prompt

OUTPUT = ROOT / "output"
WORKFLOW = ROOT / "workflows" / "subject-generation.json"
LOADERS = ("BLIPDiffusionLoader", "BLIPDiffusionQFormerLoader")

#: The small model, a thing that it was never trained on, and the contexts to sample it in.
SMALL_MODEL = ROOT / "mini" / "model"
GIVEN, WORD = ROOT / "mini" / "inputs" / "buoy.png", "buoy"
CONTEXTS = ("in the snow", "on the grass", "on the beach", "at night")
EDGE = 256
ROW = "demo.png"


def sample_row(given: Path = GIVEN, word: str = WORD) -> Path:
    """Sample one thing in four contexts with the small model, by the workflow that people open first.

    Args:
        given: Image of the thing.
        word: Word for it.

    Returns:
        Path of an image in ``output/``: the given image and the four sampled ones in a row.
    """
    base = make_base_directory(OUTPUT / "demo")
    shutil.copy(given, base / "input" / given.name)
    name = link_checkpoint(base / "models" / "blip_diffusion", SMALL_MODEL)
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    print("Starting ComfyUI ...")
    images = [Image.open(given)]
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
            (path,) = saved_images(_queue_with_bar(server, asked), base)
            images.append(Image.open(path))
    with atomic_file(OUTPUT / ROW) as temporary:
        in_a_row(images, EDGE).save(temporary, format="PNG")
    return OUTPUT / ROW


def run_workflow(workflow: Path, checkpoint: Path) -> list[Path]:
    """Run a saved workflow on the sample pictures, which the pack brings into the input folder.

    Args:
        workflow: Workflow as the browser saves it.
        checkpoint: Folder or file with BLIP-Diffusion weights.

    Returns:
        Paths of the images it saved, copied to ``output/``.

    Raises:
        FileNotFoundError: If there is no such workflow or checkpoint.
    """
    if not workflow.is_file():
        raise FileNotFoundError(f"No workflow is at '{workflow}': name a .json that the browser saved.")
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    base = make_base_directory(OUTPUT / "demo")
    name = link_checkpoint(base / "models" / "blip_diffusion", checkpoint)
    print("Starting ComfyUI ...")
    with ComfyServer(base) as server:
        prompt = to_prompt(graph, server.object_info())
        for loader in LOADERS:
            if any(node["class_type"] == loader for node in prompt.values()):
                prompt = override(prompt, loader, checkpoint=name)
        history = _queue_with_bar(server, prompt)
    return [Path(shutil.copy(path, OUTPUT / path.name)) for path in saved_images(history, base)]


def main() -> int:
    """Run the demo as the command line asks, and print the paths of its images.

    Returns:
        The exit code: 0, or 1 with one line on stderr.
    """
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="real BLIP-Diffusion weights, instead of the small model")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="what to run with them")
    chosen = parser.parse_args()
    try:
        paths = run_workflow(chosen.workflow, chosen.checkpoint) if chosen.checkpoint else [sample_row()]
    except (ServerError, WorkflowError, WorkflowFormatError, OSError, json.JSONDecodeError) as problem:
        print(f"The demo failed: {problem}", file=sys.stderr)
        return 1
    if not paths:
        print(f"The demo failed: '{chosen.workflow}' saves no picture, add a Save Image node.", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    if not chosen.checkpoint:
        print(f"Left: the {WORD} that was given. Then: that {WORD} {', '.join(CONTEXTS)}, by the small model in mini/.")
    return 0


def in_a_row(images: Sequence[Image.Image], height: int, gap: int = 0) -> Image.Image:
    """Put images beside each other.

    Args:
        images: Images of any sizes.
        height: Height that all are scaled to, in pixels.
        gap: Width of the white gaps between them, in pixels.
    """
    scaled = [
        image.convert("RGB").resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)
        for image in images
    ]
    row = Image.new("RGB", (sum(each.width + gap for each in scaled) - gap, height), "white")
    left = 0
    for image in scaled:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def link_checkpoint(models: Path, checkpoint: Path) -> str:
    """Link weights into a folder of models, and return their name in the loader's list."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"No checkpoint is at '{checkpoint}': name a BLIP-Diffusion folder or file.")
    link = models / checkpoint.name
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.resolve())
    return link.name


def saved_images(history: History, base: Path) -> list[Path]:
    """List the files that a run's Save Image nodes wrote."""
    return [file for files in history.files.values() for file in files if base / "output" in file.parents]


def _queue_with_bar(server: ComfyServer, prompt: Prompt) -> History:
    """Queue a prompt; a progress bar shows the node that runs, and its steps if it reports them."""
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
