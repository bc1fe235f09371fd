"""Stage 2, subject representation learning (arXiv 2305.14720, section 3.2): prompted context generation.

The target is a photograph; the input is its subject on another background. The U-Net learns to predict the photograph's
noise from its caption with the input's subject vectors in it, and whatever makes the vectors learns with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count, takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ...data.collate import Batch, subject_batch
from ...data.latent_cache import LatentCache
from ...diffusion.noise_schedule import ALPHAS_CUMPROD, add_noise
from ...pipeline import Pipeline
from ...pipeline.clip_text_model import encode_prompts
from ...pipeline.sample import NEGATIVE_PROMPT, sample_images, tokenize_prompts
from ..options import Flag, Fraction, LatentEdge, Number, OptionGroup, PositiveCount, Probability
from .base import CollateFn, Stage, encode_images, image_grid, make_generators
from .subject_vectors import qformer_output, replace_words

MAX_SAMPLES = 8


class DataOptions(OptionGroup):
    """How pairs are read.

    Args:
        resolution: Edge of the target, in pixels; its short edge is fitted and the middle kept.
        max_repetitions: Most times that a caption is repeated in its prompt, as Subject Prompt Compose repeats it; the
            number is sampled for each pair.
        cache_latents: Whether the targets' latents are kept on disk, for small data that is read many times.
    """

    resolution: LatentEdge = 512
    max_repetitions: PositiveCount = 1
    cache_latents: Flag = False


class DropoutOptions(OptionGroup):
    """How often something is left out.

    Args:
        subject: Probability that the subject vectors are left out, so that the model keeps its images without one.
        projection: Dropout inside the projection.
        caption: Probability that the whole caption is left out, for classifier-free guidance. The paper's U-Net
            has learnt that before; one trained from nothing has to.
        word: Probability that the subject's word is replaced, see :func:`~.subject_vectors.replace_words`.
    """

    subject: Probability = 0.15
    projection: Fraction = 0.1
    caption: Probability = 0.0
    word: Probability = 0.0


class DiffusionOptions(OptionGroup):
    """How noise is added and how its timesteps are weighted; the paper's runs leave all of it at 0.

    Args:
        min_snr_gamma: Weight each timestep by min(SNR, gamma) / SNR (arXiv 2303.09556); 0 weights all alike.
        max_velocity_weight: Weight each timestep by 1 + 1 / SNR as well, as if v were predicted (arXiv 2202.00512), but
            by no more than this. Where there is little signal an image's outlines are decided, and an error there is a
            small one of the noise. 0 does not.
        multires_noise: Scale of the coarser noise that is added, see :func:`add_multires_noise`; 0 adds none.
    """

    min_snr_gamma: Number = 0.0
    max_velocity_weight: Number = 0.0
    multires_noise: Number = 0.0


class SubjectStage(Stage):
    """Noise prediction on the target, with the subject vectors in the caption."""

    name = "subject"
    uses = ("encoder", "text_encoder", "unet", "vae")
    trains = ("encoder.qformer", "encoder.projection", "text_encoder", "unet")

    class Options(OptionGroup):
        """Options of stage 2.

        Args:
            data: How pairs are read.
            dropout: How often something is left out.
            diffusion: How noise is added and how its timesteps are weighted.
        """

        data: DataOptions = DataOptions()
        dropout: DropoutOptions = DropoutOptions()
        diffusion: DiffusionOptions = DiffusionOptions()

    options: Options

    def __init__(self, pipeline: Pipeline, options: Options, output: Path):
        super().__init__(pipeline, options, output)
        diffusion = options.diffusion
        self.timestep_weights = timestep_weights(ALPHAS_CUMPROD, diffusion.min_snr_gamma, diffusion.max_velocity_weight)
        self.latent_cache = None
        if options.data.cache_latents:
            self.latent_cache = LatentCache(output / "latents", pipeline.vae, options.data.resolution)

    @property
    def collate_fn(self) -> CollateFn:
        """Subjects, their words, targets and captions."""
        return partial(subject_batch, size=self.image_size, resolution=self.options.data.resolution)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the error of the predicted noise, weighted by timestep."""
        generators = make_generators(batch["seeds"])
        latents = self._encode_targets(batch, generators)  # [B, 4, H / 8, W / 8]
        context = self._encode_captions(batch, generators)  # [B, 77, width]
        noise = randn_tensor(latents.shape, generators, latents.device)
        timesteps = sample_timesteps(self.timestep_weights, generators)  # [B], on the CPU, where the weights are
        weights = loss_weights(self.timestep_weights)[timesteps].to(latents.device)
        timesteps = timesteps.to(latents.device)
        if scale := self.options.diffusion.multires_noise:
            noise = add_multires_noise(noise, scale, generators)
        noisy = add_noise(latents, noise, timesteps)
        predicted = self.pipeline.unet(noisy, timesteps, context).sample
        self._last_batch = batch
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))  # [B]
        return {"loss": (errors * weights).mean()}

    def samples(self) -> Image.Image:
        """Show subjects of the last batch, their targets, and what is sampled of them from noise."""
        batch = {name: value[:MAX_SAMPLES] for name, value in self._last_batch.items()}
        vectors = self._encode_subjects(batch["pixel_values"], batch["words"])
        height, width = (edge // 8 for edge in batch["targets"].shape[2:])
        noise = randn_tensor((len(vectors), 4, height, width), make_generators(range(len(vectors))), vectors.device)
        sampled = sample_images(self.pipeline, batch["captions"], list(vectors), noise=noise)
        subjects = F.interpolate(batch["subjects"].float(), sampled.shape[2:])
        return image_grid([subjects, batch["targets"], sampled])

    @torch.no_grad()
    def _encode_targets(self, batch: Batch, generators: list[torch.Generator]) -> Tensor:
        """Sample the targets' latents [B, 4, H / 8, W / 8], scaled as the U-Net expects them."""
        if self.latent_cache:
            mean, deviation = self.latent_cache.encode(batch["targets"])
        else:
            mean, deviation = encode_images(self.pipeline.vae, batch["targets"])
        latents = mean + deviation * randn_tensor(mean.shape, generators, mean.device)
        return latents * self.pipeline.vae.config["scaling_factor"]

    def _encode_captions(self, batch: Batch, generators: list[torch.Generator]) -> Tensor:
        """Encode the captions with the subject vectors in them, after all dropout, to [B, 77, width]."""
        dropout = self.options.dropout
        words, captions = replace_words(batch["words"], batch["captions"], dropout.word, generators)
        vectors = self._encode_subjects(batch["pixel_values"], words, generators)  # [B, Q, width]
        prompts, subjects = [], []
        for caption, own, generator in zip(captions, vectors, generators, strict=True):
            drop_subject, drop_caption, repeat, which = torch.rand(4, generator=generator).tolist()
            if drop_caption < dropout.caption:
                prompts.append(NEGATIVE_PROMPT if which < 0.5 else "")
                subjects.append(None)
            else:
                prompts.append(", ".join([caption] * (1 + int(repeat * self.options.data.max_repetitions))))
                subjects.append(None if drop_subject < dropout.subject else own)
        return encode_prompts(self.pipeline.text_encoder, tokenize_prompts(self.pipeline, prompts), subjects)

    def _encode_subjects(
        self, pixel_values: Tensor, words: Sequence[str], generators: list[torch.Generator] | None = None
    ) -> Tensor:
        """Encode subjects as the encoder's own forward does, with the projection's dropout where there are generators.

        Args:
            pixel_values: Preprocessed images of shape [B, 3, S, S].
            words: Word for each subject.
            generators: Generator of each pair for the dropout; without them there is none.

        Returns:
            Subject vectors of shape [B, Q, width].
        """
        output = qformer_output(self.pipeline.encoder, pixel_values, words)
        return self.pipeline.encoder.projection(output, self._dropout_mask(output, generators) if generators else None)

    def _dropout_mask(self, output: Tensor, generators: list[torch.Generator]) -> Tensor | None:
        """Sample each pair's dropout from its own generator, as a mask [B, Q, width] to multiply with."""
        probability = self.options.dropout.projection
        if not probability:
            return None
        sampled = torch.stack([torch.rand(output.shape[1:], generator=generator) for generator in generators])
        return ((sampled >= probability) / (1 - probability)).to(output)


def timestep_weights(alphas_cumprod: Tensor, min_snr_gamma: float, max_velocity_weight: float) -> Tensor:
    """Weight the timesteps of the noise schedule.

    Args:
        alphas_cumprod: Noise schedule of shape [T].
        min_snr_gamma: See :class:`DiffusionOptions`.
        max_velocity_weight: See :class:`DiffusionOptions`.

    Returns:
        Weights of shape [T].
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = snr.clamp(max=min_snr_gamma) / snr if min_snr_gamma else torch.ones_like(snr)
    if max_velocity_weight:
        weights = weights * (1 + 1 / snr).clamp(max=max_velocity_weight)
    return weights


def sample_timesteps(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample timesteps with a probability that is proportional to the root of their weight.

    The other root is in the loss, see :func:`loss_weights`. With all of the weight in the loss, most steps of training
    would be spent on timesteps that hardly count; with none of it, the noisiest timesteps would fill them, although
    their errors are the smallest.

    Args:
        weights: Weight of each timestep, of shape [T].
        generators: Generator of each pair.

    Returns:
        One timestep for each generator, of shape [B].
    """
    cumulative = weights.sqrt().cumsum(dim=0) / weights.sqrt().sum()  # [T]
    sampled = torch.cat([torch.rand(1, generator=generator) for generator in generators])  # [B]
    return torch.searchsorted(cumulative, sampled, right=True).clamp(max=len(weights) - 1)


def loss_weights(weights: Tensor) -> Tensor:
    """Weight the losses of timesteps from :func:`sample_timesteps`, so that both together weight as given.

    Args:
        weights: Weight of each timestep, of shape [T].

    Returns:
        Weights of shape [T], 1 on average over many samples.
    """
    return weights.sqrt() * weights.sqrt().mean() / weights.mean()


def add_multires_noise(noise: Tensor, scale: float, generators: list[torch.Generator]) -> Tensor:
    """Add noise of every coarser resolution.

    White noise is so faint at an image's coarse scales that even the noisiest latent of SD's schedule shows outlines
    there; a model learns to read them, and reads some into the noise that it samples from. With this it learns to read
    them from the prompt. (After Jonathan Whitaker's "Multi-Resolution Noise for Diffusion Model Training", Weights &
    Biases, 2023, but the finest noise is left as it is, because images are sampled from noise of that strength.)

    Args:
        noise: White noise of shape [B, C, H, W].
        scale: Scale of the noise of half the resolution; that of a quarter is scaled by its square, and so on down to
            one value for the whole image.
        generators: Generator of each pair.

    Returns:
        Noise of shape [B, C, H, W].
    """
    batch, channels, height, width = noise.shape
    level_scale = scale
    for factor in takewhile(lambda factor: factor <= min(height, width), (2**level for level in count(1))):
        size = [-(-edge // factor) for edge in (height, width)]  # rounded up
        coarse = randn_tensor((batch, channels, *size), generators, noise.device)
        noise = noise + level_scale * F.interpolate(coarse, (height, width), mode="bilinear")
        level_scale *= scale
    return noise
