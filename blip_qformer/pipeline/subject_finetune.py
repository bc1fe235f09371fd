"""Fine-tuning outside ComfyUI: diffusers' U-Net and VAE, on the device and in the precision of ``accelerate``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..checkpoint.ldm_keys import stable_diffusion_checkpoint
from ..checkpoint.write_safetensors import write_safetensors
from ..encoder import preprocess
from ..finetune.loop import FinetuneResult, FinetuneSettings, Step, SubjectTuning, check_size, finetune
from ..finetune.lora import LoRA
from ..finetune.loss_curve import loss_curve
from ..finetune.validation import (
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    VALIDATION_PROMPTS,
    Validation,
    preview_grid,
    validation_noise,
)
from ..prompt import compose_prompt
from ..subject import Subject, save_subject
from ..subject.provenance import encoder_hash, image_hash
from .clip_text_model import encode_prompts
from .pipeline import Pipeline
from .sample import draw, tokenize_prompts


class FinetuneRun:
    """One subject learned by one model.

    Args:
        pipeline: the model. Training the whole U-Net changes it; low-rank factors leave it as it is.
        pictures: of the subject, each [1, H, W, 3] in 0..1.
        word: for it.
        rank: of low-rank factors; None: the whole U-Net trains.
        resolution: edge of the square that is learned, in pixels.
        mirror: learn from mirrored pictures too.
        guidance, repetitions: of the pictures that are drawn on the way.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        accelerator: Accelerator,
        pictures: Sequence[Tensor],
        word: str,
        settings: FinetuneSettings,
        *,
        rank: int | None,
        resolution: int = 512,
        gradient_checkpointing: bool = False,
        mirror: bool = False,
        guidance: float = GUIDANCE_SCALE,
        repetitions: int = 20,
    ):
        self.pipeline, self.accelerator, self.word, self.resolution = pipeline, accelerator, word, resolution
        self.guidance, self.repetitions = guidance, repetitions
        for network in pipeline.networks.values():
            network.requires_grad_(False).eval().to(accelerator.device)
        if gradient_checkpointing:
            pipeline.unet.train()  # diffusers checkpoints in training alone; its U-Net has no dropout
            pipeline.unet.enable_gradient_checkpointing()
        self.image_hash = image_hash(pictures[0])
        self.lora = None if rank is None else LoRA(pipeline.unet, rank, settings.seed, accelerator.device)
        if self.lora is None:
            pipeline.unet.requires_grad_(True)
        self.tuning = SubjectTuning(
            self._denoise,
            self.lora.parameters if self.lora else list(pipeline.unet.parameters()),
            self._vectors(pictures),
            self._latents(pictures, mirror),
            self._encode_caption,
            settings,
            lora=self.lora is not None,
        )

    def tune(self, every: int = 0, show: bool = True) -> FinetuneResult:
        """Fine-tune, with a progress bar on the terminal.

        Args:
            every: how many steps lie between two looks; 0: none.
            show: whether there is a bar.
        """
        before = self.tuning.vectors.detach().clone()

        def draw_validation(with_subject: bool) -> Tensor:
            return self._draw(self.tuning.vectors.detach() if with_subject else None)

        def judge(plain: Tensor) -> Validation:
            return Validation(self._look, self.word, before, VALIDATION_PROMPTS, plain)

        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=self.tuning.settings.steps, desc="finetune", disable=not show))
            if self.lora:
                stack.enter_context(self.lora)

            def watch(step: Step, drawn: list[Tensor]) -> bool:
                bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
                bar.update()
                return True

            return finetune(
                self.tuning, validate_every=every, sample=draw_validation, make_validation=judge, on_step=watch
            )

    def write(self, folder: Path, name: str, outcome: FinetuneResult) -> list[Path]:
        """The tuned subject, the weights, and the pictures; their paths."""
        encoder = encoder_hash(self.pipeline.encoder.state_dict())
        subject = Subject(self.tuning.vectors.detach().cpu()[None], self.word, encoder, self.image_hash)
        kind = "lora" if self.lora else "checkpoint"
        paths = [folder / f"{name}.safetensors", folder / f"{name}-{kind}.safetensors"]
        save_subject(paths[0], subject, overwrite=True)
        if self.lora:
            weights, dtype = self.lora.state_dict(), torch.float16
        else:
            networks = (self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.vae)
            weights, dtype = stable_diffusion_checkpoint(*map(_weights, networks)), torch.float16
        write_safetensors(paths[1], weights, metadata={"format": "pt"}, dtype=dtype, overwrite=True)
        paths.append(folder / f"{name}-curve.png")
        loss_curve(outcome.losses, outcome.scores, outcome.kept_step).save(paths[-1])
        if outcome.samples:
            paths.append(folder / f"{name}-previews.png")
            Image.fromarray((preview_grid(outcome.samples) * 255).round().byte().numpy()).save(paths[-1])
        return paths

    def _denoise(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.pipeline.unet(noisy, timesteps, context).sample.float()

    def _encode_caption(self, vectors: Tensor) -> Tensor:
        """[1, 77, width]"""
        return encode_prompts(
            self.pipeline.text_encoder, tokenize_prompts(self.pipeline, [f"a {self.word}"]), [vectors]
        )

    @torch.no_grad()
    def _vectors(self, pictures: Sequence[Tensor]) -> Tensor:
        """The mean of the pictures' vectors, [16, width]."""
        size = self.pipeline.encoder.config.vision.image_size
        pixels = torch.cat([preprocess(picture, size=size) for picture in pictures]).to(self.accelerator.device)
        return self.pipeline.encoder(pixels, [self.word] * len(pixels)).mean(dim=0)

    @torch.no_grad()
    def _latents(self, pictures: Sequence[Tensor], mirror: bool) -> Tensor:
        """[N or 2N, 4, h, w], scaled as the U-Net expects them."""
        squares = torch.cat([middle_square(picture, self.resolution) for picture in pictures])
        squares = torch.cat([squares, squares.flip(3)]) if mirror else squares
        squares = squares.to(self.accelerator.device) * 2 - 1
        means = [self.pipeline.vae.encode(square[None]).latent_dist.mean for square in squares]
        return torch.cat(means) * self.pipeline.vae.config.scaling_factor

    def _draw(self, vectors: Tensor | None) -> Tensor:
        """The validation prompts' pictures [P, 3, H, W] in 0..1; no vectors: the prompts alone."""
        texts = [compose_prompt(prompt, self.word, repetitions=self.repetitions) for prompt in VALIDATION_PROMPTS]
        size = self.resolution // 8
        with self.accelerator.autocast():
            return draw(
                self.pipeline,
                texts,
                [vectors] * len(texts),
                noise=validation_noise(len(texts), (4, size, size)),
                negative="",
                steps=NUM_INFERENCE_STEPS,
                guidance=self.guidance,
            )

    @torch.no_grad()
    def _look(self, pictures: Tensor, words: Sequence[str]) -> Tensor:
        size = self.pipeline.encoder.config.vision.image_size
        pixels = preprocess(rearrange(pictures, "b c h w -> b h w c").cpu(), size=size)
        return self.pipeline.encoder(pixels.to(self.accelerator.device), list(words))


def read_picture(path: Path) -> Tensor:
    """A picture file -> [1, H, W, 3] in 0..1, upright.

    Raises:
        ValueError: it is no picture, or too small.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that can be read: leave it out.") from error
    check_size(*pixels.shape[:2])
    return torch.from_numpy(pixels.copy())[None] / 255


def middle_square(picture: Tensor, edge: int) -> Tensor:
    """[1, H, W, 3] -> [1, 3, edge, edge]: the short edge is fitted and the middle kept."""
    height, width = picture.shape[1:3]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = rearrange(picture[:, top : top + short, left : left + short], "b h w c -> b c h w")
    return F.interpolate(square, (edge, edge), mode="bicubic", antialias=True).clamp(0, 1)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors under their published names."""
    return network.published() if hasattr(network, "published") else network.state_dict()
