"""A step of stage 2 against a plain text-to-image step of the same U-Net, and how training scales with processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import ROOT
from benchmarks.measuring import compare
from benchmarks.table import Row
from blip_qformer.data.collate import Batch
from blip_qformer.data.pairs import Pair
from blip_qformer.pipeline import SCHEDULER_CONFIG
from blip_qformer.training.batches import pair_seeds, to_device
from blip_qformer.training.config import RunConfig, config_from, read_config
from blip_qformer.training.stages import Stage, make_stage

RUN = ROOT / "mini" / "runs" / "1-autoencoder.yaml"
BATCH, PAIRS, EDGE = 8, 3, 256
SCALING_BATCH, SCALING_STEPS = 4, 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALING_HEAD = ("processes, one thread each", "samples/s", "of one process's")


def training_rows() -> Iterator[Row]:
    """Stage 2 of the small model, without anything that is cached, against diffusers' own way to train that U-Net."""
    stage = _stage().to(DEVICE)
    batch = _batch(stage, BATCH)
    yield Row(
        f"stage 2, a step of {BATCH} pairs at {EDGE}x{EDGE}, the small model",
        "a plain diffusers text-to-image step of the same U-Net, VAE and text encoder",
        compare(_step(stage, lambda: stage(batch)["loss"]), _plain_step(stage, batch), PAIRS),
        "at most 1.11",
    )


def scaling() -> Iterator[tuple[str, ...]]:
    """Samples a second of one process and of two over gloo, each with one thread and a batch of its own."""
    alone = _samples_per_second(1)
    for processes in (1, 2):
        speed = alone if processes == 1 else _samples_per_second(processes)
        yield str(processes), f"{speed:.2f}", f"{speed / alone:.2f}"


def _run() -> RunConfig:
    """The small model's sizes with the paper's way to train it: no cache, no second weight of the loss."""
    sizes = read_config(RUN).model
    options = {"data": {"resolution": EDGE}}
    run = {"stage": "subject", "model": sizes, "pairs": "none", "output": "none", "options": options}
    return config_from(run | {"steps": 1, "batch_size": BATCH, "learning_rate": 1e-6}, "the benchmark")


def _stage() -> Stage:
    return make_stage(_run()).train()


def _batch(stage: Stage, count: int) -> Batch:
    image = Image.effect_noise((EDGE, EDGE), 60).convert("RGB")
    pairs = [Pair(str(number), image, image, "dog", "a dog in the snow") for number in range(count)]
    batch = stage.collate_fn(pairs)
    batch["seeds"] = pair_seeds(0, range(count))
    return to_device(batch, DEVICE)


def _step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """One update of everything in a model that trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _plain_step(stage: Stage, batch: Batch) -> Callable[[], None]:
    """As diffusers' text-to-image example has it: encode the image, encode the text, predict the noise."""
    ours = stage.pipeline.text_encoder.config
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=ours.width,
            intermediate_size=ours.feed_forward_width,
            num_hidden_layers=ours.layers,
            num_attention_heads=ours.heads,
        )
    ).to(DEVICE)
    unet, vae = stage.pipeline.unet, stage.pipeline.vae
    scheduler = DDPMScheduler.from_config(SCHEDULER_CONFIG)
    tokenize = stage.pipeline.tokenizer

    def loss() -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(batch["targets"] * 2 - 1).latent_dist.sample() * vae.config.scaling_factor
        ids = tokenize(batch["captions"], padding="max_length", max_length=77, return_tensors="pt").input_ids
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, text_encoder(ids.to(DEVICE))[0]).sample, noise)

    return _step(nn.ModuleList([unet, text_encoder]), loss)


def _samples_per_second(processes: int) -> float:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "benchmarks.training"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return processes * SCALING_BATCH * SCALING_STEPS / max(map(float, printed.split()))


def _train_a_while() -> None:
    """As one of several processes that torchrun started: print the seconds that a few steps took."""
    torch.distributed.init_process_group("gloo")
    stage = _stage()
    model = nn.parallel.DistributedDataParallel(stage, find_unused_parameters=True)
    batch = to_device(_batch(stage, SCALING_BATCH), torch.device("cpu"))
    step = _step(stage, lambda: model(batch)["loss"])
    step()
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(SCALING_STEPS):
        step()
    print(time.perf_counter() - start, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _train_a_while()
