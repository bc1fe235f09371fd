"""Fine-tune a model on one subject outside ComfyUI, with diffusers' U-Net and VAE.

Device and precision are those of ``accelerate``; the loop itself is :mod:`blip_qformer.finetune.loop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..atomic import atomic_files
from ..checkpoint.ldm_keys import stable_diffusion_checkpoint
from ..checkpoint.write_safetensors import write_safetensors
from ..encoder import preprocess
from ..encoder.preprocessing import to_squares
from ..finetune.loop import FinetuneResult, FinetuneSettings, SubjectTuning, check_size, finetune
from ..finetune.lora import LoRA
from ..finetune.loss_curve import loss_curve
from ..finetune.snapshots import Snapshots, snapshot_key
from ..finetune.validation import (
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    VALIDATION_PROMPTS,
    Validation,
    preview_grid,
    validation_noise,
)
from ..imaging.image_files import load_image
from ..imaging.pil import to_pil_image
from ..prompt import compose_prompt
from ..subject import Subject, save_subject
from ..subject.preview import EDGE, MAX_TILES, make_preview
from ..subject.provenance import encoder_hash, image_hash
from .clip_text_model import encode_prompts
from .pipeline import Pipeline
from .sample import sample_images, tokenize_prompts


class FinetuneRun:
    """One subject and the model that is fine-tuned on it.

    Args:
        pipeline: The model. Training the whole U-Net changes it; a LoRA leaves it as it is.
        accelerator: Device and precision of the run.
        images: Images of the subject, each of shape [1, H, W, 3] in 0..1.
        word: The subject's word.
        settings: Settings of the loop.
        rank: Rank of the LoRA; with None the whole U-Net trains.
        resolution: Edge of the square training images in pixels.
        gradient_checkpointing: Whether to recompute the U-Net's activations instead of keeping them.
        mirror: Whether to train on mirrored images too.
        guidance_scale: Guidance scale of the validation images.
        repetitions: How often a validation prompt repeats its sentence.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        accelerator: Accelerator,
        images: Sequence[Tensor],
        word: str,
        settings: FinetuneSettings,
        *,
        rank: int | None,
        resolution: int = 512,
        gradient_checkpointing: bool = False,
        mirror: bool = False,
        guidance_scale: float = GUIDANCE_SCALE,
        repetitions: int = 20,
    ) -> None:
        self.pipeline, self.accelerator, self.word, self.resolution = pipeline, accelerator, word, resolution
        self.guidance_scale, self.repetitions = guidance_scale, repetitions
        self.snapshots: Snapshots | None = None
        for network in pipeline.networks.values():
            network.requires_grad_(False).eval().to(accelerator.device)
        if gradient_checkpointing:
            pipeline.unet.train()  # diffusers checkpoints in training mode only; its U-Net has no dropout
            pipeline.unet.enable_gradient_checkpointing()
        self.images, self.image_hash = images, image_hash(images[0])
        self.preview = make_preview(torch.cat([to_squares(image, "crop", None, EDGE) for image in images[:MAX_TILES]]))
        self.values = {
            "word": word,
            "settings": asdict(settings),
            "rank": rank,
            "resolution": resolution,
            "gradient_checkpointing": gradient_checkpointing,
            "mirror": mirror,
            "guidance_scale": guidance_scale,
            "repetitions": repetitions,
            "precision": accelerator.mixed_precision,
        }
        self.lora = None if rank is None else LoRA(pipeline.unet, rank, settings.seed, accelerator.device)
        if self.lora is None:
            pipeline.unet.requires_grad_(True)
        self.tuning = SubjectTuning(
            self._denoise,
            self.lora.parameters if self.lora else list(pipeline.unet.parameters()),
            self._encode_subject(images),
            self._encode_latents(images, mirror),
            self._encode_caption,
            settings,
            lora=self.lora is not None,
        )

    def tune(
        self, validate_every: int = 0, show_progress: bool = True, snapshots: Path | None = None
    ) -> FinetuneResult:
        """Fine-tune.

        Args:
            validate_every: Number of steps between two validations; 0 means none.
            show_progress: Whether to show a progress bar on the terminal.
            snapshots: Folder of what a run that was ended needs to go on; None keeps nothing.

        Returns:
            Losses, scores and validation images.
        """
        if snapshots:
            values = {**self.values, "validate_every": validate_every, "prompts": VALIDATION_PROMPTS}
            weights = [network.state_dict() for network in self.pipeline.networks.values()]
            key = snapshot_key(weights, self.images, values)
            self.snapshots = Snapshots(snapshots, key)
        initial_vectors = self.tuning.vectors.detach().clone()  # [16, width]

        def sample(with_subject: bool) -> Tensor:
            return self._sample(self.tuning.vectors.detach() if with_subject else None)

        def make_validation(baseline: Tensor) -> Validation:
            return Validation(self._encode_samples, self.word, initial_vectors, VALIDATION_PROMPTS, baseline)

        with ExitStack() as stack:
            steps = self.tuning.settings.steps
            bar = stack.enter_context(tqdm(total=steps, desc="finetune", disable=not show_progress))
            if self.lora:
                stack.enter_context(self.lora)

            def on_step(losses: Sequence[float], samples: Sequence[Tensor]) -> None:
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update(len(losses) - bar.n)

            return finetune(
                self.tuning,
                validate_every=validate_every,
                sample=sample,
                make_validation=make_validation,
                on_step=on_step,
                snapshots=self.snapshots,
            )

    def save(self, folder: Path, name: str, result: FinetuneResult) -> list[Path]:
        """Write the fine-tuned subject, the weights, the loss curve and the validation images, all of them or none.

        Those of an earlier run under the same name are exchanged together: a subject never lies beside another run's
        weights. After that no snapshot is needed, and there is none.

        Args:
            folder: The folder to write to.
            name: What the files' names begin with.
            result: The result of :meth:`tune`.

        Returns:
            The files' paths.
        """
        encoder = encoder_hash(self.pipeline.encoder.state_dict())
        subject = Subject(self.tuning.vectors.detach().cpu()[None], self.word, encoder, self.image_hash, self.preview)
        kind = "lora" if self.lora else "checkpoint"
        images = {"curve": loss_curve(result.losses, result.scores, result.kept_step)}
        if result.samples:
            images["previews"] = to_pil_image(preview_grid(result.samples))
        paths = [folder / f"{name}.safetensors", folder / f"{name}-{kind}.safetensors"]
        paths += [folder / f"{name}-{ending}.png" for ending in images]
        with atomic_files(paths) as (subject_file, weights_file, *image_files):
            save_subject(subject_file, subject)
            write_safetensors(weights_file, self._state_dict(), metadata={"format": "pt"}, dtype=torch.float16)
            for file, image in zip(image_files, images.values(), strict=True):
                image.save(file, format="PNG")  # the temporary name has another suffix
        if self.snapshots:
            self.snapshots.remove()
        return paths

    def _state_dict(self) -> dict[str, Tensor]:
        """Return the LoRA, or the whole model as a Stable Diffusion checkpoint."""
        if self.lora:
            return self.lora.state_dict()
        unet, text_encoder, vae = self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.vae
        return stable_diffusion_checkpoint(unet.state_dict(), text_encoder.hub_state_dict(), vae.state_dict())

    def _denoise(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.pipeline.unet(noisy, timesteps, context).sample.float()

    def _encode_caption(self, vectors: Tensor) -> Tensor:
        """Encode "a <vectors> <word>" as a context [1, 77, width]."""
        input_ids = tokenize_prompts(self.pipeline, [f"a {self.word}"])
        return encode_prompts(self.pipeline.text_encoder, input_ids, [vectors])

    @torch.no_grad()
    def _encode_subject(self, images: Sequence[Tensor]) -> Tensor:
        """Compute the mean of the images' subject vectors, [16, width]."""
        size = self.pipeline.encoder.config.vision.image_size
        pixel_values = torch.cat([preprocess(image, size=size) for image in images]).to(self.accelerator.device)
        return self.pipeline.encoder(pixel_values, [self.word] * len(pixel_values)).mean(dim=0)

    @torch.no_grad()
    def _encode_latents(self, images: Sequence[Tensor], mirror: bool) -> Tensor:
        """Encode the training images as latents [N or 2N, 4, h, w], scaled as the U-Net expects them."""
        squares = torch.cat([_center_square(image, self.resolution) for image in images])  # [N, 3, H, W]
        squares = torch.cat([squares, squares.flip(3)]) if mirror else squares
        squares = squares.to(self.accelerator.device) * 2 - 1
        means = [self.pipeline.vae.encode(square[None], return_dict=False)[0].mean for square in squares]
        return torch.cat(means) * self.pipeline.vae.config["scaling_factor"]

    def _sample(self, vectors: Tensor | None) -> Tensor:
        """Sample the validation prompts' images [P, 3, H, W] in 0..1, with subject vectors or without."""
        prompts = [compose_prompt(prompt, self.word, repetitions=self.repetitions) for prompt in VALIDATION_PROMPTS]
        size = self.resolution // 8
        with self.accelerator.autocast():
            return sample_images(
                self.pipeline,
                prompts,
                [vectors] * len(prompts),
                noise=validation_noise(len(prompts), (4, size, size)),
                negative_prompt="",
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=self.guidance_scale,
            )

    @torch.no_grad()
    def _encode_samples(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """Compute the subject vectors [B, 16, width] of images [B, 3, H, W]."""
        size = self.pipeline.encoder.config.vision.image_size
        pixel_values = preprocess(rearrange(images, "b c h w -> b h w c").cpu(), size=size)
        return self.pipeline.encoder(pixel_values.to(self.accelerator.device), list(words))


def read_image(path: Path) -> Tensor:
    """Read an image file upright.

    Args:
        path: The file.

    Returns:
        The image, of shape [1, H, W, 3] in 0..1.

    Raises:
        ValueError: The file is missing, damaged, no image, too small, or too large; it is named.
    """
    image = load_image(path)
    try:
        check_size(*image.shape[1:3])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return image


def _center_square(image: Tensor, edge: int) -> Tensor:
    """Crop the middle square of an image [1, H, W, 3] and scale it to [1, 3, edge, edge]."""
    height, width = image.shape[1:3]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = rearrange(image[:, top : top + short, left : left + short], "b h w c -> b c h w")
    return F.interpolate(square, (edge, edge), mode="bicubic", antialias=True).clamp(0, 1)
