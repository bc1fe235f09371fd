"""Make the workflows' thumbnails in a real ComfyUI, with the small model in place of the published one.

A thumbnail is a square: what goes in, what comes out, and below it the workflow's title, because the template browser
shows nothing but the file's name. ``python -m tools.thumbnails`` makes all of them. Those workflows that need a
ControlNet or a checkpoint of Stable Diffusion's size, which the small model cannot run, show what goes in.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from blip_qformer.atomic import atomic_file
from tools.demo import SMALL_MODEL, link_checkpoint, saved_images
from tools.host import ROOT, ComfyServer, Prompt, make_base_directory
from tools.sample_images import painted
from tools.workflow import override, to_prompt

EDGE, CAPTION, GIVEN, GAP = 400, 60, 112, 4  # pixels of a thumbnail, of its caption, of what goes in, between them
FONT_SIZES = range(30, 12, -1)
HALVED = ("width", "height")  # the workflows sample at 512 pixels, the small model at 256
SIZED = ("EmptyLatentImage", "ImageScale")

PAINTED = "pear-painted.png"  # the pear, with a mask in its alpha channel

#: Images and words of the workflows, and those of the small model's world that replace them.
IMAGES = {
    "blip-diffusion-cat.jpg": "buoy.png",
    "blip-diffusion-cup.jpg": "pear.png",
    "blip-diffusion-cup-painted.png": PAINTED,
    "blip-diffusion-rocket.jpg": "lobster.png",
    "blip-diffusion-cat-near.jpg": "buoy.png",
    "blip-diffusion-cat-evening.jpg": "buoy.png",
}
#: Of single workflows: the small world's pictures show one thing, and this one two.
OWN_IMAGES = {"replace-two": {"blip-diffusion-cup.jpg": "two.png"}}
WORDS = {"cat": "buoy", "cup": "pear", "rocket": "lobster"}
SAMPLES = ROOT / "workflows" / "inputs"
CONTEXT, SCENE = "on the grass", "grass"

#: Further changes to a workflow: node class -> inputs.
CHANGES: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "attention-reweight": {
        "BLIPDiffusionAttentionReweight": {"weights": "<end>:2.0, <subject>:2.0"},
        "BLIPDiffusionAttentionMap": {"words": "<subject>, grass"},
    },
    "edit-generated": {},
    "edit-photo": {"BLIPDiffusionPromptToPrompt": {"source_blend_words": "pear"}},
    "replace-two": {
        "BLIPDiffusionSubjectRegions": {"boxes": "0.02, 0.3, 0.48, 0.52\n0.5, 0.3, 0.48, 0.52"},
    },
    "subject-finetune": {
        "BLIPDiffusionSubjectFinetune": {"subject_word": "buoy", "resolution": 256, "learning_rate": 5e-5}
    },
    "subject-generation": {},
    "subject-img2img": {},
    "subject-inpaint": {},
    "subject-trajectory": {
        "BLIPDiffusionSubjectTrajectory": {"steps": 7},
        "BLIPDiffusionSubjectGrid": {"columns": 3},
    },
    "three-subjects": {},
    "two-subjects": {},
}


def small_prompt(workflow: str, object_info: dict[str, Any], checkpoint: str) -> Prompt:
    """Change a workflow so that the small model can run it.

    Args:
        workflow: Name of the workflow's file, without ``.json``.
        object_info: Answer of the server at ``/object_info``.
        checkpoint: Name of the small model in the loader's list.
    """
    graph = json.loads((ROOT / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
    prompt = to_prompt(graph, object_info)
    for node in prompt.values():
        _make_small(node["class_type"], node["inputs"], checkpoint, IMAGES | OWN_IMAGES.get(workflow, {}))
    for node, inputs in CHANGES[workflow].items():
        prompt = override(prompt, node, **inputs)
    return prompt


def make_thumbnail(server: ComfyServer, workflow: str, base: Path, checkpoint: str) -> Image.Image:
    """Run a workflow, if the small model can, and lay out its given and its sampled images.

    Args:
        server: Running server.
        workflow: Name of the workflow's file, without ``.json``.
        base: Base directory of the server.
        checkpoint: Name of the small model in the loader's list.
    """
    graph = json.loads((ROOT / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
    (title,) = [node["title"] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    if workflow not in CHANGES:
        return in_a_square(
            [Image.open(SAMPLES / name) for name in _given(to_prompt(graph, server.object_info()))], title
        )
    prompt = small_prompt(workflow, server.object_info(), checkpoint)
    sampled = [Image.open(file) for file in saved_images(server.queue(prompt), base)]
    if workflow == "subject-trajectory":  # a sheet, with what is given at its ends
        return in_a_square([ImageOps.pad(sampled[0].convert("RGB"), (EDGE, EDGE - CAPTION), color="white")], title)
    return in_a_square([*(Image.open(base / "input" / name) for name in _given(prompt)), *sampled], title)


def in_a_square(images: Sequence[Image.Image], title: str) -> Image.Image:
    """Lay images out above a title: the last one large, as many others as fit small beside it, or above a wide one.

    Args:
        images: Images of any sizes.
        title: Title of the workflow.
    """
    square = Image.new("RGB", (EDGE, EDGE), "white")
    *small, large = images
    across = len(small) > 1 and large.width > 1.2 * large.height
    height = EDGE - CAPTION
    small = small[: (EDGE if across else height) // GIVEN]  # what was given comes first
    for number, image in enumerate(small):
        corner = (number * (GIVEN + GAP), 0) if across else (0, number * (GIVEN + GAP))
        square.paste(ImageOps.fit(image.convert("RGB"), (GIVEN, GIVEN)), corner)
    left, top = ((0, GIVEN + GAP) if across else (GIVEN + GAP, 0)) if small else (0, 0)
    square.paste(ImageOps.fit(large.convert("RGB"), (EDGE - left, height - top)), (left, top))
    draw = ImageDraw.Draw(square)
    fonts = (ImageFont.load_default(size) for size in FONT_SIZES)
    font = next((font for font in fonts if draw.textlength(title, font) <= EDGE - 16), None)
    draw.text((EDGE // 2, EDGE - CAPTION // 2), title, fill="black", anchor="mm", font=font)
    return square


def main() -> int:
    """Make the thumbnails that the command line names, all of them if it names none; return the exit code."""
    base = make_base_directory(ROOT / "output" / "thumbnails")
    own = [name for images in OWN_IMAGES.values() for name in images.values()]
    for name in {*IMAGES.values(), *own} - {PAINTED}:
        shutil.copy(ROOT / "mini" / "inputs" / name, base / "input")
    add_painted(base / "input")
    checkpoint = link_checkpoint(base / "models" / "blip_diffusion", SMALL_MODEL)
    with ComfyServer(base) as server:
        for workflow in sys.argv[1:] or sorted(path.stem for path in (ROOT / "workflows").glob("*.json")):
            target = ROOT / "workflows" / f"{workflow}.jpg"
            image = make_thumbnail(server, workflow, base, checkpoint)
            with atomic_file(target) as temporary:
                image.save(temporary, format="JPEG", quality=88)
            print(f"Wrote {target.relative_to(ROOT)} ({target.stat().st_size / 1000:.0f} kB).")
    return 0


def add_painted(folder: Path) -> None:
    """Write the small model's picture with a painted mask into a folder."""
    painted(Image.open(ROOT / "mini" / "inputs" / "pear.png"), (0.1, 0.1, 0.9, 0.9)).save(folder / PAINTED)


def _given(prompt: Prompt) -> list[str]:
    """Return the names of the images that a prompt loads, each once."""
    return [*dict.fromkeys(node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage")]


def _make_small(node: str, inputs: dict[str, Any], checkpoint: str, images: Mapping[str, str]) -> None:
    """Change one node's inputs in place, so that the small model can sample it."""
    if node in SIZED:
        inputs |= {name: inputs[name] // 2 for name in HALVED if name in inputs}
    elif node == "BLIPDiffusionLoader":
        inputs["checkpoint"] = checkpoint
    elif node == "LoadImage":
        inputs["image"] = images[inputs["image"]]
    elif node == "BLIPDiffusionSubjectEncode":
        inputs["subject_word"] = WORDS[inputs["subject_word"]]
    elif node == "BLIPDiffusionPromptCompose":
        target = WORDS.get(inputs["target_subject"], "")
        inputs |= {"prompt": CONTEXT, "target_subject": target, "prompt_strength": 0.2}
    elif node == "CLIPTextEncode" and "shelf" in inputs["text"]:
        inputs["text"] = SCENE
    elif node == "CLIPTextEncode":
        inputs["text"] = ""  # the small model has not learned what "low quality" looks like
    elif node == "BLIPDiffusionSubjectSave":
        inputs["overwrite"] = True  # a tool runs it more than once
    elif node in ("KSampler", "KSamplerAdvanced"):
        inputs["cfg"] = 4.0


if __name__ == "__main__":
    raise SystemExit(main())
