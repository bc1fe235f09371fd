"""Compare everything once at the published sizes: ``python -m benchmarks.full_size [--write]``.

Random weights are written as a Hub folder (6.2 GB), loaded by the host's nodes, and each step is compared with the
reference on the same weights. Takes 24 GB of memory, 25 GB of disk and about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.memory import Cost, cost_in_own_process
from benchmarks.table import RESULTS, machine, markdown_table, write_section
from tests import oracle
from tests.host import Host, load_host
from tests.random_weights import write_hub_folder
from tools.host import comfyui_path

COMMAND = "python -m benchmarks.full_size"
GUIDANCE = 7.5
SCALING_FACTOR = 0.18215  # between the host's latents and the reference's
WORD, NEGATIVE = "dog", "ugly"
HEAD = ("what", "max abs difference", "reference's std", "relative to std", "time, s: ours, reference")
COST_HEAD = ("what", "weights, GB", "RssAnon peak, GB", "VmHWM, GB", "RssAnon / weights", "time, s")

Row = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Parity and memory at the published sizes.")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {RESULTS.name}")
    parser.add_argument("--edges", type=int, nargs="+", default=[256, 512], help="sizes of the sampled pictures")
    arguments = parser.parse_args()

    parity, costs = [], []
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = Path(temporary)
        pipeline = oracle.pipeline(oracle.FULL, folder / "tokenizer", comfyui_path())
        hub = write_hub_folder(pipeline, folder / "hub")
        _collect(costs, _costs(hub, folder / "converted"))
        host = load_host(folder / "host")
        (host.base / "models" / "blip_diffusion" / "full").symlink_to(hub, target_is_directory=True)
        _collect(parity, _parity(host, pipeline, arguments.edges))
        gc.collect()
        checkpoints = host.base / "models" / "checkpoints"
        for file in (folder / "converted" / "float32").iterdir():
            target = "blip_diffusion" if "qformer" in file.name else "checkpoints"
            file.rename(checkpoints.parent / target / file.name)
        _collect(parity, _converted(host, pipeline))

    text = (
        f"{machine()}. Random weights, float32; ViT-L/14 (23 blocks), BERT-base, CLIP-L, SD1.5's U-Net and VAE. With "
        "random weights a U-Net's latents grow far beyond one, so their difference is also given relative to their "
        f"standard deviation.\n\n{markdown_table(HEAD, parity)}\n\n"
        "Memory added while loading and converting, each in a process of its own:\n\n"
        f"{markdown_table(COST_HEAD, costs)}"
    )
    print(f"\n{text}")
    if arguments.write:
        write_section(COMMAND, text)


def _parity(host: Host, pipeline: oracle.BlipDiffusionPipeline, edges: list[int]) -> Iterator[Row]:
    """Compare our graph with the reference: vectors, conditioning, a DDIM run and its image for each size."""
    model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint="full")
    for batch in (2, 1):
        image = torch.rand(batch, 224, 224, 3, generator=torch.manual_seed(batch))
        (subject, *_), seconds = _timed(
            lambda image=image: host.run(
                "BLIPDiffusionSubjectEncode", qformer=qformer, image=image, subject_word=WORD, average_batch=False
            )
        )
        pixel_values = host.module("blip_qformer.encoder").preprocess(image)
        expected, peer_seconds = _timed(
            lambda pixel_values=pixel_values: pipeline.get_query_embeddings(pixel_values, [WORD] * len(pixel_values))
        )
        yield _row(f"encoder vectors, batch {batch}", subject.vectors, expected, seconds, peer_seconds)

    (positive, text), seconds = _timed(lambda: _compose(host, clip, subject))
    expected, peer_seconds = _timed(lambda: pipeline.encode_prompt(subject.vectors, [text]))
    yield _row("prompt embeddings", positive[0][0], expected, seconds, peer_seconds)

    for edge in edges:
        noise = torch.randn(1, 4, edge // 8, edge // 8, generator=torch.manual_seed(7))
        latents, seconds = _timed(lambda noise=noise: _sample(host, model, clip, positive, noise, 10))
        expected, peer_seconds = _timed(
            lambda noise=noise: _reference(pipeline, noise, pipeline.encode_prompt(subject.vectors, [text]), 10)
        )
        yield _row(
            f"latents after 10 DDIM steps, guidance {GUIDANCE}, {edge}x{edge}", latents, expected, seconds, peer_seconds
        )
        # Scaled like a trained U-Net's latents: beyond that, an image is all black and white.
        latent = expected / expected.std()
        (image,), seconds = _timed(
            lambda latent=latent: host.run("VAEDecode", vae=vae, samples={"samples": latent / SCALING_FACTOR})
        )
        decoded, peer_seconds = _timed(lambda latent=latent: pipeline.vae.decode(latent / SCALING_FACTOR).sample)
        decoded = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        yield _row(
            f"picture decoded from those latents over their std, {edge}x{edge}", image, decoded, seconds, peer_seconds
        )


def _converted(host: Host, pipeline: oracle.BlipDiffusionPipeline) -> Iterator[Row]:
    """The float32 files of `blip-qformer convert`, through the stock CheckpointLoaderSimple and our Q-Former loader."""
    model, clip, _ = host.run("CheckpointLoaderSimple", ckpt_name="blip_diffusion_sd15.safetensors")[:3]
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint="blip2_qformer.safetensors")
    image = torch.rand(1, 224, 224, 3, generator=torch.manual_seed(1))
    subject, *_ = host.run("BLIPDiffusionSubjectEncode", qformer=qformer, image=image, subject_word=WORD)
    pixel_values = host.module("blip_qformer.encoder").preprocess(image)
    yield _row("converted: encoder vectors", subject.vectors, pipeline.get_query_embeddings(pixel_values, [WORD]))
    positive, text = _compose(host, clip, subject)
    expected = pipeline.encode_prompt(subject.vectors, [text])
    yield _row("converted: prompt embeddings", positive[0][0], expected)
    noise = torch.randn(1, 4, 32, 32, generator=torch.manual_seed(7))
    latents = _sample(host, model, clip, positive, noise, 4)
    yield _row("converted: latents after 4 DDIM steps, 256x256", latents, _reference(pipeline, noise, expected, 4))


def _compose(host: Host, clip, subject):
    return host.run("BLIPDiffusionPromptCompose", clip=clip, subject=subject, prompt="swimming underwater")


def _sample(host: Host, model, clip, positive, noise: Tensor, steps: int) -> Tensor:
    """Return the stock KSampler's latents in the reference's scale; seed 7 makes the same noise in the host."""
    (negative,) = host.run("CLIPTextEncode", clip=clip, text=NEGATIVE)
    latent = host.ddim(model, positive, negative, {"samples": torch.zeros_like(noise)}, steps, GUIDANCE, seed=7)
    return latent["samples"] * SCALING_FACTOR


def _reference(pipeline: oracle.BlipDiffusionPipeline, noise: Tensor, prompt: Tensor, steps: int) -> Tensor:
    return oracle.ddim(pipeline, noise, prompt, NEGATIVE, steps, GUIDANCE)


def _costs(hub: Path, converted: Path) -> Iterator[Row]:
    """Measure loading the Hub folder and converting it; leaves the float32 files in ``converted``."""
    encoder, whole = _size(hub / "qformer"), _size(hub)
    yield _cost_row("load the subject encoder", encoder, cost_in_own_process("load encoder", hub))
    yield _cost_row("Load BLIP-Diffusion", whole, cost_in_own_process("load through host", hub))
    for dtype in ("float16", "float32"):
        cost = cost_in_own_process("convert", hub, converted / dtype, dtype)
        sizes = " + ".join(f"{_gigabytes(file.stat().st_size)} GB" for file in sorted((converted / dtype).iterdir()))
        yield _cost_row(f"blip-qformer convert --dtype {dtype} (wrote {sizes})", whole, cost)


def _row(what: str, ours: Tensor, expected: Tensor, *seconds: float) -> Row:
    difference, spread = (ours - expected).abs().max().item(), expected.std().item()
    times = ", ".join(f"{value:.1f}" for value in seconds)
    return what, f"{difference:.1e}", f"{spread:.3g}", f"{difference / spread:.1e}", times


def _cost_row(what: str, weights: int, cost: Cost) -> Row:
    memory = map(_gigabytes, (weights, cost.anonymous, cost.resident))
    return what, *memory, f"{cost.anonymous / weights:.2f}", f"{cost.seconds:.1f}"


def _collect(rows: list[Row], new: Iterator[Row]) -> None:
    """Keep rows, and print each once it is measured: all of them take minutes."""
    for row in new:
        print(" | ".join(row), flush=True)
        rows.append(row)


def _timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


if __name__ == "__main__":
    main()
