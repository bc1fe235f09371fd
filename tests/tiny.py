"""A model and pairs of a size that trains in no time: what the tests of training run on."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from blip_qformer.data.pairs import Pair
from blip_qformer.data.shards import write_shard
from blip_qformer.pipeline import Pipeline, new_pipeline
from blip_qformer.training.batches import pair_seeds
from blip_qformer.training.config import RunConfig, config_from
from blip_qformer.training.stages import Stage
from blip_qformer.training.stages import make_stage as make_fresh_stage
from blip_qformer.training.stages.base import CollateFn
from blip_qformer.training.trainer import train
from mini.init import initialise
from mini.stages import STAGES
from mini.stages.cpu_attention import fast_attention
from tests.oracle import randomized
from tools.host import comfyui_path

WORDS = ("dog", "teddy bear", "red apple", "cat")
BACKGROUNDS = ("in the snow", "on the grass", "at night, under a sky full of stars")

#: Like the small model that ships, only smaller.
SIZES: dict[str, Any] = {
    "vision": {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "heads": 2, "feed_forward_width": 64},
    "qformer": {"width": 32, "layers": 2, "heads": 2, "feed_forward_width": 64, "text_positions": 32},
    "projection_width": 128,
    "text_encoder": {"width": 32, "layers": 2, "heads": 2, "feed_forward_width": 64},
    "unet": {
        "sample_size": 4,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {
        "sample_size": 32,
        "latent_channels": 4,
        "block_out_channels": [32, 32, 32, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "tokenizer": str(comfyui_path() / "comfy" / "sd1_tokenizer"),
}

#: What the small model hands to the training loop.
SMALL: dict[str, Any] = {"stages": STAGES, "step_context": fast_attention, "initialise": initialise}

#: For each stage a run of it; pairs are 32 pixels square.
OPTIONS: dict[str, dict[str, Any]] = {
    "autoencoder": {"crop": 16},
    "appearance": {"edge": 16, "head_width": 32},
    "vision": {"shared_width": 8},
    "multimodal": {"shared_width": 8, "caption_tokens": 12},
    "subject": {"data": {"resolution": 32}},
}


def make_pair(number: int) -> Pair:
    """A pair of two random images, 32 pixels square."""
    pixels = np.random.default_rng(number).integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    subject, target = (Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC) for each in pixels)
    word, background = WORDS[number % len(WORDS)], BACKGROUNDS[number % len(BACKGROUNDS)]
    return Pair(f"{number:04d}", subject, target, word, f"a {word} {background}")


def write_pairs(folder: Path, shards: int = 4, per_shard: int = 8) -> Path:
    """Shards of pairs."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        write_shard(folder / f"{shard}.tar", map(make_pair, range(shard * per_shard, (shard + 1) * per_shard)))
    return folder


def make_config(stage: str = "subject", **changes: Any) -> RunConfig:
    """A short run of a stage; what it reads and writes is named by ``changes``."""
    values = {
        "stage": stage,
        "model": copy.deepcopy(SIZES),
        "pairs": "pairs",
        "output": "output",
        "steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "num_workers": 0,
        "shuffle_buffer": 5,
        "checkpoint_every": 0,
        "options": OPTIONS[stage],
    }
    return config_from(values | changes, "the test")


def random_pipeline() -> Pipeline:
    """A whole model whose weights are all random."""
    pipeline = new_pipeline(SIZES, seed=0)
    for seed, network in enumerate(pipeline.networks.values()):
        randomized(network, seed)
    return pipeline


def make_stage(stage: str = "subject", **changes: Any) -> Stage:
    """A stage whose weights are all random, biases and scales too, so that nothing is hidden by a zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the heads that a stage adds
        made = make_fresh_stage(make_config(stage, **changes), STAGES)
    with_gradients = {parameter: parameter.requires_grad for parameter in made.parameters()}
    randomized(made.networks, seed=0)
    for parameter, trains in with_gradients.items():
        parameter.requires_grad_(trains)
    return made.train()


def make_batch(stage: str, numbers: Sequence[int], **options: Any) -> dict[str, Any]:
    """The pairs of these numbers as a batch, with the seeds they have in a run."""
    collate_fn = collate_fn_of(stage, json.dumps(OPTIONS[stage] | options))
    batch = collate_fn([make_pair(number) for number in numbers])
    return {**batch, "seeds": [pair_seeds(0, range(number, number + 1))[0] for number in numbers]}


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with some settings changed."""
    return config.model_copy(update=changes)


@cache
def collate_fn_of(stage: str, options: str) -> CollateFn:
    """What makes a batch of pairs, for options in JSON."""
    return make_stage(stage, options=json.loads(options)).collate_fn


def run(config: RunConfig, stop_at: int | None = None, **handed: Any) -> Path:
    """Train in this process, as if none had been trained in it before, with what the small model hands in."""
    reset_accelerate()
    return train(config, stop_at, **(SMALL | handed))


def reset_accelerate() -> None:
    """Forget accelerate's settings, which it keeps for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
