"""Stage 2, subject representation learning (arXiv 2305.14720, section 3.2): prompted context generation.

The target is a photograph; the input is its subject on another background. The U-Net learns to draw the photograph from
its caption with the input's sixteen vectors in it, and whatever makes the vectors learns with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, takewhile

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from ...data.collate import Batch, subject_batch
from ...data.latent_cache import LatentCache
from ...data.pairs import Pair
from ...pipeline.clip_text_model import encode_prompts
from ...pipeline.pipeline import SCHEDULER, image_size_of
from ...pipeline.sample import NEGATIVE_PROMPT, draw, tokenize_prompts
from ..config import RunConfig
from .base import Stage, generators, normal, side_by_side
from .subject_vectors import ask, exchange_words

SHOWN = 8


class SubjectStage(Stage):
    """Noise prediction on the target, with the subject's vectors in the caption.

    Options:
        resolution: edge of the target, in pixels; its short edge is fitted and the middle kept.
        subject_dropout: how often the subject is left out, so that the model still draws without one.
        caption_dropout: how often the whole caption is left out, for classifier-free guidance. The paper's U-Net knew
            that already; one trained from nothing has to learn it.
        repetitions: the caption is said up to so many times, as Subject Prompt Compose does; 1: once, as in the paper.
        projection_dropout: inside the projection.
        word_dropout: how often the subject's word gives way to another, see :func:`.questions.exchange_words`; the
            paper keeps its words.
        min_snr_gamma: a timestep counts min(signal-to-noise ratio, this) over that ratio (arXiv 2303.09556), which is
            worth most to a small model; 0: all timesteps count alike, as in the paper.
        coarse_weight: and 1 + 1 / ratio times as much, as if v were predicted (arXiv 2202.00512), but no more than
            this. Where there is little signal a picture's outlines are decided, and an error there is a small one of
            the noise; 0: not, as in the paper.
        multires_noise: how much noise of coarser scales is added to the usual, see :func:`add_multires_noise`; 0: none, as
            in the paper.
        cache_latents: whether targets' latents are kept on disk, for small data that is seen many times.
    """

    name = "subject"
    uses = ("encoder", "text_encoder", "unet", "vae")
    trains = ("encoder.qformer", "encoder.projection", "text_encoder", "unet")

    def __init__(self, config: RunConfig):
        super().__init__(config)
        if config.gradient_checkpointing:
            self.pipeline.unet.enable_gradient_checkpointing()
        self.latents = None
        if self.cache_latents:
            self.latents = LatentCache(config.output / "latents", self.pipeline.vae, self.options(config)["resolution"])

    def _set(
        self,
        resolution: int = 512,
        subject_dropout: float = 0.15,
        caption_dropout: float = 0.0,
        repetitions: int = 1,
        projection_dropout: float = 0.1,
        word_dropout: float = 0.0,
        min_snr_gamma: float = 0.0,
        coarse_weight: float = 0.0,
        multires_noise: float = 0.0,
        cache_latents: bool = False,
    ) -> None:
        if resolution < 8 or resolution % 8:
            raise ValueError(f"The option resolution is {resolution}, but the VAE reads multiples of 8.")
        if projection_dropout >= 1:
            raise ValueError(f"The option projection_dropout is {projection_dropout}, which leaves nothing.")
        self.subject_dropout, self.caption_dropout = subject_dropout, caption_dropout
        self.projection_dropout, self.word_dropout = projection_dropout, word_dropout
        self.repetitions, self.multires_noise = repetitions, multires_noise
        self.scheduler = DDPMScheduler.from_config(SCHEDULER)
        self.weights = timestep_weights(self.scheduler.alphas_cumprod, min_snr_gamma, coarse_weight)
        self.cache_latents = cache_latents

    @classmethod
    def collate(cls, config: RunConfig) -> Callable[[Sequence[Pair]], Batch]:
        return partial(subject_batch, size=image_size_of(config), resolution=cls.options(config)["resolution"])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sources = generators(batch["seeds"])
        latents = self._encode_targets(batch, sources)  # [B, 4, H / 8, W / 8]
        context = self._encode_captions(batch, sources)  # [B, 77, width]
        noise = normal(sources, latents.shape[1:], latents.device)
        timesteps = draw_timesteps(self.weights, sources)  # on the CPU, where the weights are
        counts = drawn_weights(self.weights)[timesteps].to(latents.device)
        timesteps = timesteps.to(latents.device)
        if self.multires_noise:
            noise = add_multires_noise(noise, self.multires_noise, sources)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted = self.pipeline.unet(noisy, timesteps, context).sample
        self._shown = batch
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))  # [B]
        return {"loss": (errors * counts).mean()}

    def samples(self) -> Image.Image:
        """Subjects of the last batch, their targets, and what is drawn of them from noise."""
        batch = {name: value[:SHOWN] for name, value in self._shown.items()}
        vectors = self._encode_subjects(batch["pixel_values"], batch["words"])
        latent = [edge // 8 for edge in batch["targets"].shape[2:]]
        noise = normal(generators(range(len(vectors))), (4, *latent), vectors.device)
        drawn = draw(self.pipeline, batch["captions"], list(vectors), noise=noise)
        subjects = F.interpolate(batch["subjects"].float(), drawn.shape[2:])
        return side_by_side([subjects, batch["targets"], drawn])

    @torch.no_grad()
    def _encode_targets(self, batch: Batch, sources: list[torch.Generator]) -> Tensor:
        if self.latents:
            mean, deviation = self.latents.encode(batch["targets"])
        else:
            distribution = self.pipeline.vae.encode(batch["targets"] * 2 - 1).latent_dist
            mean, deviation = distribution.mean.float(), distribution.std.float()
        latents = mean + deviation * normal(sources, mean.shape[1:], mean.device)
        return latents * self.pipeline.vae.config.scaling_factor

    def _encode_captions(self, batch: Batch, sources: list[torch.Generator]) -> Tensor:
        words, said = exchange_words(batch["words"], batch["captions"], self.word_dropout, sources)
        vectors = self._encode_subjects(batch["pixel_values"], words, sources)
        captions, subjects = [], []
        for caption, own, source in zip(said, vectors, sources, strict=True):
            drop_subject, drop_caption, repeat, which = torch.rand(4, generator=source).tolist()
            if drop_caption < self.caption_dropout:
                captions.append(NEGATIVE_PROMPT if which < 0.5 else "")
                subjects.append(None)
            else:
                captions.append(", ".join([caption] * (1 + int(repeat * self.repetitions))))
                subjects.append(None if drop_subject < self.subject_dropout else own)
        return encode_prompts(self.pipeline.text_encoder, tokenize_prompts(self.pipeline, captions), subjects)

    def _encode_subjects(
        self, pixel_values: Tensor, words: Sequence[str], sources: list[torch.Generator] | None = None
    ) -> Tensor:
        """[B, 16, width]; the same as the encoder's own forward.

        Args:
            sources: of the projection's dropout; without them there is none.
        """
        answer = ask(self.pipeline.encoder, pixel_values, words)
        return self.pipeline.encoder.projection(answer, self._dropout(answer, sources) if sources else None)

    def _dropout(self, answer: Tensor, sources: list[torch.Generator]) -> Tensor | None:
        """What to multiply with for dropout, drawn for each pair from its own source."""
        if not self.projection_dropout:
            return None
        chances = torch.stack([torch.rand(answer.shape[1:], generator=source) for source in sources])
        return ((chances >= self.projection_dropout) / (1 - self.projection_dropout)).to(answer)


def timestep_weights(alphas_cumprod: Tensor, min_snr_gamma: float, coarse_weight: float) -> Tensor:
    """What each timestep counts [T]; see the options of these names."""
    ratio = alphas_cumprod / (1 - alphas_cumprod)
    weights = ratio.clamp(max=min_snr_gamma) / ratio if min_snr_gamma else torch.ones_like(ratio)
    if coarse_weight:
        weights = weights * (1 + 1 / ratio).clamp(max=coarse_weight)
    return weights


def draw_timesteps(weights: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
    """One timestep [B] from each source; half of what it counts, by its root, is how often it comes.

    The other half is :func:`drawn_weights`. If all were in the loss, most steps of training would be spent on what
    hardly counts; if none were, the noisiest timesteps would fill them, although their errors are the smallest.
    """
    shares = weights.sqrt().cumsum(dim=0) / weights.sqrt().sum()  # [T]
    chances = torch.cat([torch.rand(1, generator=source) for source in sources])  # [B]
    return torch.searchsorted(shares, chances, right=True).clamp(max=len(weights) - 1)


def drawn_weights(weights: Tensor) -> Tensor:
    """What each drawn timestep counts in the loss [T]; over many draws 1 on average. See :func:`draw_timesteps`."""
    return weights.sqrt() * weights.sqrt().mean() / weights.mean()


def add_multires_noise(noise: Tensor, amount: float, sources: Sequence[torch.Generator]) -> Tensor:
    """Noise of every coarser scale on top of noise [B, C, H, W]: the first doubling of the grain is scaled by
    ``amount``, the second by its square, and so on up to one value for the whole picture.

    White noise is so faint at a picture's coarse scales that even the noisiest latent of SD's schedule shows outlines
    there; a model learns to read them, and reads some into the noise that it draws from. With this it learns to take
    them from the prompt. (After Jonathan Whitaker's "Multi-Resolution Noise for Diffusion Model Training", Weights &
    Biases, 2023, but the finest noise is left as it is, because pictures are drawn from noise of that strength.)
    """
    edge, scale = min(noise.shape[2:]), amount
    for grain in takewhile(lambda grain: grain <= edge, (2**doublings for doublings in count(1))):
        coarse = normal(sources, (noise.shape[1], *(-(-side // grain) for side in noise.shape[2:])), noise.device)
        noise = noise + scale * F.interpolate(coarse, noise.shape[2:], mode="bilinear")
        scale *= amount
    return noise
