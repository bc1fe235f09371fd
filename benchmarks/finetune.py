"""Fine-tuning on one subject: time and memory, against the stock Train LoRA node and a plain diffusers loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks.measuring import compare, seconds_per_step
from benchmarks.memory import cost_in_own_process
from benchmarks.models import hosted, reference_pipeline
from benchmarks.table import Row
from blip_qformer.pipeline import SCHEDULER_CONFIG
from tests.host import Host, load_host

PAIRS, STEPS, BATCH, RANK, WORD = 3, 4, 3, 16, "dog"
EDGE = 512 if torch.cuda.is_available() else 256
RATES = {"low-rank": 1e-4, "full": 5e-6}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MEMORY_HEAD = ("what", "seconds", "peak beside the models, GB")
WAYS = ("low-rank", "low-rank, diffusers and peft", "low-rank, stock Train LoRA", "full", "full, diffusers")


def finetune_rows(host: Host, loaded: SimpleNamespace, unet: UNet2DConditionModel) -> Iterator[Row]:
    """Compare the seconds of a step on the same latents, with gradient checkpointing.

    The peers keep the caption's context; ours goes through the text encoder and back in every step, because the vectors
    train. That encoder is full size, unlike the U-Net, and its share falls with the size of the images.
    """
    work = works(host, loaded, unet)
    where = f"a step of {BATCH} at {EDGE}x{EDGE}"
    for ours, peer, named in (
        ("low-rank", "low-rank, diffusers and peft", "a plain diffusers and peft loop, rank and layers the same"),
        ("low-rank", "low-rank, stock Train LoRA", "the stock Train LoRA node, rank the same, all layers"),
        ("full", "full, diffusers", "a plain diffusers loop"),
    ):
        comparison = compare(work[ours], work[peer], PAIRS, seconds_per_step)
        yield Row(f"Subject Fine-tune, {ours}, {where}", named, comparison, "at most 1")


def finetune_costs() -> Iterator[tuple[str, ...]]:
    """Measure the memory of the same, each in a process of its own."""
    for way in WAYS:
        cost = cost_in_own_process("finetune", way)
        yield way, f"{cost.seconds:.1f}", f"{cost.anonymous / 1e9:.2f}"


def one_way(way: str) -> Callable[[], Any]:
    """Prepare one of :data:`WAYS`, with models of its own."""
    folder = Path(tempfile.mkdtemp())
    host = load_host(folder / "host")
    pipeline = reference_pipeline(folder / "reference")
    return works(host, hosted(host, pipeline), pipeline.unet)[way]


def works(host: Host, loaded: SimpleNamespace, unet: UNet2DConditionModel) -> dict[str, Callable[[], Any]]:
    """Return the functions that are measured, by their names in :data:`WAYS`."""
    width = unet.config.cross_attention_dim
    vectors = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(BATCH, 4, EDGE // 8, EDGE // 8, generator=torch.Generator().manual_seed(1))
    (caption,) = host.run("CLIPTextEncode", clip=loaded.clip, text=f"a {WORD}")

    def ours(trains: str) -> Callable[[], Any]:
        return lambda: _ours(host, loaded, vectors, latents, trains)

    def plain(low_rank: bool) -> Callable[[], None]:
        return lambda: _plain(unet, caption[0][0], latents, low_rank)

    stock = {"algorithm": "LoRA", "training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": RATES["low-rank"]}
    stock |= {"steps": STEPS, "batch_size": BATCH, "rank": RANK, "gradient_checkpointing": True}

    def train_lora() -> None:
        listed = {name: [value] for name, value in stock.items()}
        rest = {"grad_accumulation_steps": [1], "optimizer": ["AdamW"], "loss_function": ["MSE"], "seed": [0]}
        one_by_one = [{"samples": latent[None]} for latent in latents]  # of one batch, this node forgets a variable
        inputs = {"model": [loaded.model], "latents": one_by_one, "positive": [caption]}
        with torch.inference_mode():
            host.nodes["TrainLoraNode"].execute(**inputs, **listed, **rest, existing_lora=["[None]"])

    return dict(zip(WAYS, (ours("low-rank"), plain(True), train_lora, ours("full"), plain(False)), strict=True))


def _ours(host: Host, loaded: SimpleNamespace, vectors: Tensor, latents: Tensor, trains: str) -> Any:
    """Fine-tune as the node does, without validation."""
    module = host.module("nodes.host.finetune")
    settings = host.module("blip_qformer.finetune.loop").FinetuneSettings(STEPS, batch_size=BATCH)
    with torch.inference_mode(False):
        finetuner = module.HostFinetuner(loaded.model, loaded.clip, None, loaded.qformer, WORD, trains, RANK, True)
        return finetuner.tune(vectors.clone(), latents.clone(), settings)


def _plain(unet: UNet2DConditionModel, context: Tensor, latents: Tensor, low_rank: bool) -> None:
    """Fine-tune as diffusers' own examples do: frozen text encoder, noise prediction, AdamW."""
    device = next(unet.parameters()).device
    with torch.inference_mode(False):
        unet.train()
        unet.enable_gradient_checkpointing()
        unet.requires_grad_(not low_rank)
        if low_rank:
            unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION))
        trained = [weight for weight in unet.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATES["low-rank" if low_rank else "full"], weight_decay=0.01)
        scheduler = DDPMScheduler.from_config(SCHEDULER_CONFIG)
        # Copies are no inference tensors any more.
        latents, context = latents.clone().to(device), context.clone().to(device).expand(BATCH, -1, -1)
        for _ in range(STEPS):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (BATCH,), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            F.mse_loss(unet(noisy, timesteps, context).sample, noise).backward()
            optimizer.step()
            optimizer.zero_grad()
        if low_rank:
            unet.delete_adapters("default")
        unet.disable_gradient_checkpointing()
        unet.requires_grad_(False).eval()
