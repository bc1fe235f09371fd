"""Run a ComfyUI with the pack for hours, and see what is lost, what grows, and what has changed afterwards.

``make soak`` queues 500 prompts from two clients: the shipped workflows on the small model, with other sizes, words,
edits, fine-tunings and subject files in each, and among them prompts that must fail and prompts that are cancelled. Six
reference graphs run before and after; their images must be the same to the last bit. After every block of prompts one
node in the server, :data:`PROBE`, gives the C library's free memory back and reports what the process holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import torch
from PIL import Image
from safetensors.torch import save_file

from tools.demo import SMALL_MODEL, link_checkpoint, saved_images
from tools.host import ROOT, ComfyServer, Prompt, WorkflowError, make_base_directory
from tools.thumbnails import add_painted, small_prompt
from tools.workflow import override

REFERENCES = (
    "subject-generation",
    "attention-reweight",
    "edit-generated",
    "edit-photo",
    "subject-trajectory",
    "two-subjects",
)
WORKFLOWS = (*REFERENCES, "subject-img2img", "subject-inpaint")
PICTURES = ("buoy.png", "pear.png", "lobster.png")
WORDS = ("buoy", "pear", "lobster", "teddy bear", "red apple", "cat", "Tasse", "grandfather clock")
CONTEXTS = ("on the grass", "in the snow", "at night", "", "on a table beside a window, in a long sentence " * 3)
SAMPLERS = ("KSampler", "KSamplerAdvanced", "BLIPDiffusionDDIMInversion")
CLIENTS = 2
FLAT = 0.02  # so much the memory may grow after the warm-up

#: A node for the server that is measured: it collects garbage, trims malloc's heap, and counts.
PROBE = """
import ctypes, gc, json, os, threading

class SoakProbe:
    RETURN_TYPES, OUTPUT_NODE, FUNCTION, CATEGORY = (), True, "measure", "soak"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0})}}

    def measure(self, number):
        gc.collect()
        if os.name == "posix":
            ctypes.CDLL(None).malloc_trim(0)
        rss = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = {
            "rss": rss, "handles": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
            "objects": len(gc.get_objects()),
        }
        return {"ui": {"text": [json.dumps(found)]}}

NODE_CLASS_MAPPINGS = {"SoakProbe": SoakProbe}
"""


@dataclass(frozen=True)
class Job:
    """One prompt and how it must end.

    Args:
        kind: What it is, for the counts.
        prompt: The prompt.
        ends: ``done``, ``refused`` or ``cancelled``.
        sentence: Pattern of the message, where it is refused.
    """

    kind: str
    prompt: Prompt
    ends: str = "done"
    sentence: str = ""


@dataclass(frozen=True)
class Reading:
    """What the server's process held after a number of prompts; ``rss`` is in bytes."""

    prompts: int
    rss: int
    handles: int
    threads: int
    objects: int


@dataclass
class Outcome:
    """What a soak found.

    Attributes:
        readings: What the process held, from the start on.
        counts: Prompts by kind and end.
        problems: A sentence for each prompt that ended otherwise than it must, and for each changed reference.
        seconds: How long it ran.
        is_compared: Whether the reference graphs ran again at the end.
    """

    readings: list[Reading] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    is_compared: bool = False

    def growth(self) -> float:
        """Return the growth of memory after the warm-up, the first quarter of the readings, as a fraction.

        Compared are the medians of the second and of the last quarter, so that no single reading decides.
        """
        quarter = max(1, len(self.readings) // 4)
        sizes = [reading.rss for reading in self.readings]
        warm, last = sorted(sizes[quarter : 2 * quarter] or sizes), sorted(sizes[-quarter:])
        return last[len(last) // 2] / warm[len(warm) // 2] - 1


class Soak:
    """The prompts of a soak, and the server that they run on.

    Args:
        server: A running server whose base directory was made by :func:`prepare_base`.
        checkpoint: Name of the small model in the loader's list.
        seed: Seed of everything random in the prompts.
    """

    def __init__(self, server: ComfyServer, checkpoint: str, seed: int = 0) -> None:
        self.server, self.rng = server, random.Random(seed)
        info = server.object_info()
        self.prompts = {name: small_prompt(name, info, checkpoint) for name in (*WORKFLOWS, "subject-finetune")}
        self.outcome = Outcome()
        self._lock = threading.Lock()

    def run(self, count: int, block: int, until: float = float("inf")) -> Outcome:
        """Queue prompts, with readings between blocks and the reference graphs before and after.

        Args:
            count: Number of prompts.
            block: Number of prompts between two readings.
            until: :func:`time.monotonic` after which no further block begins.

        Returns:
            What was found.
        """
        began = time.monotonic()
        try:
            self._run(count, block, until)
        finally:
            self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def _run(self, count: int, block: int, until: float) -> None:
        before = self._references()
        self._measure(0)
        done = 0
        while done < count and time.monotonic() < until:
            jobs = [self.make_job() for _ in range(min(block, count - done))]
            clients = [
                threading.Thread(target=self._run_jobs, args=(jobs[n::CLIENTS],), daemon=True) for n in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            done += len(jobs)
            self._measure(done)
        after = self._references()
        changed = [name for name in before if before[name] != after[name]]
        self.outcome.problems += [f"The reference {name} gives another image afterwards." for name in changed]
        self.outcome.is_compared = True

    def make_job(self) -> Job:
        """Make one random prompt of one kind."""
        kinds: list[tuple[int, Callable[[], Job]]] = [
            (10, self._generation),
            (1, self._fine_tuning),
            (1, self._subject_file),
            (2, self._failure),
            (2, self._cancelled),
        ]
        weights, makers = zip(*kinds, strict=True)
        (make,) = self.rng.choices(makers, weights)
        return make()

    def _generation(self) -> Job:
        name = self.rng.choice(WORKFLOWS)
        return Job(name, self._varied(self.prompts[name]))

    def _fine_tuning(self) -> Job:
        trains = self.rng.choice(("low-rank", "full"))
        settings = {"trains": trains, "steps": 2, "look_every": self.rng.choice((0, 2)), "resolution": 64}
        settings["look_prompts"] = "in the snow"
        prompt = override(self._varied(self.prompts["subject-finetune"]), "BLIPDiffusionSubjectFinetune", **settings)
        return Job(f"fine-tuning ({trains})", override(prompt, "BLIPDiffusionSubjectSave", **self._saved_name()))

    def _subject_file(self) -> Job:
        prompt = self._varied(self.prompts["subject-generation"])
        (encode,) = [number for number, node in prompt.items() if node["class_type"] == "BLIPDiffusionSubjectEncode"]
        saving = {"subject": [encode, 0], **self._saved_name()}
        prompt["save"] = {"class_type": "BLIPDiffusionSubjectSave", "inputs": saving}
        return Job("subject saved", prompt)

    def _failure(self) -> Job:
        prompt = self._varied(self.prompts["subject-generation"])
        reweight, tuning = self._varied(self.prompts["attention-reweight"]), self.prompts["subject-finetune"]
        saving = override(self._subject_file().prompt, "BLIPDiffusionSubjectSave", name="../outside")
        # The host runs what else a prompt has for an output, so that this one has nothing else.
        saving = {number: node for number, node in saving.items() if node["class_type"] != "SaveImage"}
        choices = [
            (override(prompt, "BLIPDiffusionSubjectEncode", subject_word=" "), "word"),
            (override(prompt, "BLIPDiffusionLoader", checkpoint="../mini"), "was not found"),
            (override(reweight, "BLIPDiffusionAttentionReweight", weights="grass: much"), "weight"),
            (override(tuning, "LoadImage", image="tiny.png"), "The pictures are"),
            (saving, "The name"),
            ({**prompt, "load": _load_subject("lora.safetensors"), "see": _preview_text("load")}, "is a LoRA"),
        ]
        changed, sentence = self.rng.choice(choices)
        return Job(f'failure "{sentence}"', changed, "refused", sentence)

    def _cancelled(self) -> Job:
        if self.rng.random() < 0.5:
            prompt = override(self._fine_tuning().prompt, "BLIPDiffusionSubjectFinetune", steps=200, look_every=0)
            return Job("cancelled fine-tuning", prompt, "cancelled")
        name = self.rng.choice(WORKFLOWS)
        prompt = self._varied(self.prompts[name])
        for node in prompt.values():
            if node["class_type"] in SAMPLERS:
                node["inputs"]["steps"] = 200
        return Job(f"cancelled {name}", prompt, "cancelled")

    def _saved_name(self) -> dict[str, Any]:
        return {"name": f"soak_{self.rng.randrange(4)}", "overwrite": True}

    def _varied(self, prompt: Prompt) -> Prompt:
        """Return a prompt with another size, seed, picture, word and text."""
        rng = self.rng
        shrink, steps, seed = rng.choice((2, 4)), rng.choice((2, 3)), rng.randrange(2**32)
        width, height = rng.choice((64, 96, 128)), rng.choice((64, 128))
        varied = {number: {**node, "inputs": dict(node["inputs"])} for number, node in prompt.items()}
        for node in varied.values():
            kind, inputs = node["class_type"], node["inputs"]
            if kind == "ImageScale":
                inputs |= {name: inputs[name] // shrink for name in ("width", "height")}
            elif kind == "EmptyLatentImage":
                inputs |= {"width": width, "height": height}
            elif kind in SAMPLERS:
                inputs["steps"] = steps
                inputs |= {name: seed for name in ("seed", "noise_seed") if name in inputs}
                inputs |= {"end_at_step": steps} if "end_at_step" in inputs else {}
            elif kind == "BLIPDiffusionSubjectTrajectory":
                inputs["steps"] = rng.choice((2, 3))
            elif kind == "LoadImage":
                inputs["image"] = rng.choice(PICTURES)
            elif kind == "BLIPDiffusionSubjectEncode":
                inputs["subject_word"] = rng.choice(WORDS)
            elif kind == "BLIPDiffusionAttentionReweight":
                inputs["weights"] = f"<subject>:{rng.uniform(0, 3):.2f}, <end>:{rng.uniform(0, 3):.2f}"
            elif kind == "BLIPDiffusionAttentionMap":
                inputs["words"] = "<subject>"
        if _has_edit(varied):
            return varied
        return override(varied, "BLIPDiffusionPromptCompose", prompt=rng.choice(CONTEXTS))

    def _run_jobs(self, jobs: Sequence[Job]) -> None:
        """Run jobs one after the other, as one client does."""
        for job in jobs:
            try:
                problem = self._run_job(job)
            except Exception as error:  # whatever it is, it is a finding, and the other prompts go on
                problem = f"{type(error).__name__}: {error}"
            with self._lock:
                self.outcome.counts[f"{job.kind}: {job.ends}"] += 1
                if problem:
                    self.outcome.problems.append(f"{job.kind}, which should be {job.ends}: {problem}")

    def _run_job(self, job: Job) -> str:
        """Run one job; return what was wrong with its end, or an empty text."""
        cancelled = False

        def on_event(kind: str, data: dict[str, Any]) -> None:
            nonlocal cancelled
            if job.ends == "cancelled" and kind == "progress" and not cancelled:
                cancelled = True
                requests.post(f"{self.server.url}/interrupt", json={"prompt_id": data["prompt_id"]}, timeout=60)

        try:
            history = self.server.queue(job.prompt, on_event)
        except WorkflowError as error:
            if job.ends == "cancelled" and error.exception_type == "Interrupted":
                return ""
            if job.ends == "refused" and re.search(job.sentence, error.message):
                return ""
            return str(error)
        if job.ends != "done":
            return "it ran to its end"
        files = saved_images(history, self.server.base)
        for file in files:
            if file.suffix == ".png":
                with Image.open(file) as image:
                    image.load()
            file.unlink()
        return "" if files else "it saved nothing"

    def _references(self) -> dict[str, str]:
        """Run the reference graphs from nothing and return a hash of each one's pixels."""
        hashes = {}
        for name in REFERENCES:
            self.server.free()
            prompt = {number: {**node, "inputs": dict(node["inputs"])} for number, node in self.prompts[name].items()}
            for node in prompt.values():
                if node["class_type"] in SAMPLERS:
                    node["inputs"]["steps"] = 4
            digest = hashlib.sha256()
            for file in saved_images(self.server.queue(prompt), self.server.base):
                with Image.open(file) as image:
                    digest.update(image.tobytes())
            hashes[name] = digest.hexdigest()
        return hashes

    def _measure(self, prompts: int) -> None:
        """Bring the server into the same state as at every reading, and read what it holds."""
        requests.post(f"{self.server.url}/history", json={"clear": True}, timeout=60).raise_for_status()
        self.server.queue(self._resting_prompt())
        history = self.server.queue({"1": {"class_type": "SoakProbe", "inputs": {"number": prompts}}})
        found = json.loads(history.texts["1"][0])
        reading = Reading(prompts, found["rss"], found["handles"], found["threads"], found["objects"])
        self.outcome.readings.append(reading)
        print(f"{format_reading(reading)}  problems {len(self.outcome.problems)}", flush=True)

    def _resting_prompt(self) -> Prompt:
        prompt = override(self.prompts["subject-generation"], "EmptyLatentImage", width=64, height=64)
        return override(prompt, "KSampler", steps=1)


def prepare_base(folder: Path) -> str:
    """Make a base directory anew, with the small model, pictures, the probe and a LoRA among the embeddings.

    Args:
        folder: The base directory.

    Returns:
        Name of the small model in the loader's list.
    """
    shutil.rmtree(folder, ignore_errors=True)
    base = make_base_directory(folder)
    (base / "custom_nodes" / "soak_probe.py").write_text(PROBE, encoding="utf-8")
    for name in PICTURES:
        shutil.copy(ROOT / "mini" / "inputs" / name, base / "input")
    add_painted(base / "input")
    Image.new("RGB", (40, 40)).save(base / "input" / "tiny.png")
    save_file({"x.lora_up.weight": torch.zeros(4, 4)}, base / "models" / "embeddings" / "lora.safetensors")
    return link_checkpoint(base / "models" / "blip_diffusion", SMALL_MODEL)


def format_reading(reading: Reading) -> str:
    """Format a reading as one line."""
    return (
        f"{reading.prompts:4d} prompts  {reading.rss / 1e6:7.1f} MB  {reading.handles} handles  "
        f"{reading.threads} threads  {reading.objects} objects"
    )


def report(outcome: Outcome) -> Iterator[str]:
    """Yield the lines of a soak's report."""
    yield f"{outcome.counts.total()} prompts in {outcome.seconds / 60:.0f} minutes, {CLIENTS} clients"
    yield from (f"  {count:4d}  {name}" for name, count in sorted(outcome.counts.items()))
    if outcome.readings:
        yield f"memory after the warm-up: {outcome.growth():+.2%}"
    yield from outcome.problems or ["no prompt was lost"]
    if not outcome.is_compared:
        yield "ended from outside: the reference graphs did not run again"
    elif not outcome.problems:
        yield "the reference graphs give the same images"


def main() -> int:
    """Run a soak as the command line asks; return 0 if it is flat and without a problem."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--prompts", type=int, default=500, help="(500)")
    parser.add_argument("--block", type=int, default=20, help="prompts between two readings (20)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further block after so many")
    parser.add_argument("--base", type=Path, default=ROOT / "output" / "soak", help="the base directory, made anew")
    chosen = parser.parse_args()
    until = time.monotonic() + chosen.minutes * 60
    checkpoint = prepare_base(chosen.base)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it must not leave the server running
    with ComfyServer(chosen.base) as server:
        soak = Soak(server, checkpoint, chosen.seed)
        outcome = soak.outcome
        try:
            soak.run(chosen.prompts, chosen.block, until)
        except KeyboardInterrupt:
            pass  # the report says so
        finally:
            print("\n".join(report(outcome)), flush=True)
    return int(bool(outcome.problems) or not outcome.is_compared or outcome.growth() > FLAT)


def _has_edit(prompt: Prompt) -> bool:
    """Whether a prompt edits words, which would not be found in another text."""
    return any(node["class_type"] == "BLIPDiffusionPromptToPrompt" for node in prompt.values())


def _load_subject(name: str) -> dict[str, Any]:
    return {"class_type": "BLIPDiffusionSubjectLoad", "inputs": {"subject_file": name, "subject_word": ""}}


def _preview_text(node: str) -> dict[str, Any]:
    return {"class_type": "PreviewAny", "inputs": {"source": [node, 1]}}


if __name__ == "__main__":
    sys.exit(main())
