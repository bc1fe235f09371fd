"""The host's models laid out for fine-tuning on one subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn

from ...blip_qformer.diffusion.ddim import ddim_sample
from ...blip_qformer.encoder.preprocessing import composite_alpha
from ...blip_qformer.finetune.loop import (
    FULL,
    LOW_RANK,
    FinetuneCancelledError,
    FinetuneResult,
    FinetuneSettings,
    Step,
    SubjectTuning,
    finetune,
)
from ...blip_qformer.finetune.lora import LoRA, count_lora_parameters
from ...blip_qformer.finetune.validation import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, Validation, validation_noise
from ...blip_qformer.prompt import compose_prompt
from .autograd import (
    WholeUNet,
    check_memory,
    gradient_checkpointing,
    host_caption_encoder,
    host_denoiser,
    trainable,
    training_model,
)
from .managed import ManagedEncoder

Watch = Callable[[Step, list[Tensor]], bool]


@dataclass(frozen=True, eq=False)
class Tuned:
    """What fine-tuning makes: a subject [16, width], weights as a LoRA file has them, and how it went."""

    vectors: Tensor
    weights: dict[str, Tensor]
    outcome: FinetuneResult


class HostFinetuner:
    """The host's models laid out for fine-tuning; they are borrowed for each step and each drawing, and given back.

    Args:
        vae, qformer: only for the looks on the way.
        trains: ``full`` or ``low-rank``.
        rank: of low-rank factors.
        saving: gradient checkpointing.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: comfy.sd.CLIP,
        vae: comfy.sd.VAE,
        qformer: ManagedEncoder,
        word: str,
        trains: str,
        rank: int,
        saving: bool,
    ):
        self.model, self.clip, self.vae, self.qformer = training_model(model), clip, vae, qformer
        self.word, self.trains, self.rank, self.saving = word, trains, rank, saving
        self.names = diffusers_names(model)

    @property
    def network(self) -> nn.Module:
        """The U-Net."""
        return self.model.model.diffusion_model

    def tune(
        self,
        vectors: Tensor,
        latents: Tensor,
        settings: FinetuneSettings,
        *,
        every: int = 0,
        prompts: Sequence[str] = (),
        watch: Watch = lambda step, drawn: True,
    ) -> Tuned:
        """Fine-tune; outside inference mode.

        Args:
            vectors: [16, width], the mean of the pictures' vectors.
            latents: [N, 4, h, w], the pictures as the host keeps latents.
            every: how many steps lie between two looks; 0: none.
            prompts: what is drawn at each look.
            watch: see :func:`~..blip_qformer.finetune.loop.finetune`.

        Raises:
            ValueError: the device has too little memory.
        """
        device = self.model.load_device
        self._load()
        self._check_memory(settings, latents)
        weights = self._weights(settings.seed)
        tuning = SubjectTuning(
            host_denoiser(self.model),
            weights.parameters,
            vectors.to(device),
            self.model.model.process_latent_in(latents.to(device, torch.float32)),
            host_caption_encoder(self.clip, f"a {self.word}", vectors.shape[-1]),
            settings,
            lora=self.trains == LOW_RANK,
        )

        def draw(with_subject: bool) -> Tensor:
            noise = validation_noise(len(prompts), latents.shape[1:]).to(device)
            with self._borrowed(weights):
                drawn = self._draw(tuning, prompts, noise, with_subject)
            return self._decode(drawn)

        def judge(plain: Tensor) -> Validation:
            return Validation(self._look, self.word, vectors, prompts, plain)

        steps = self._steps(tuning, weights)
        outcome = finetune(tuning, validate_every=every, sample=draw, make_validation=judge, steps=steps, on_step=watch)
        file = {name: tensor.to("cpu") for name, tensor in weights.state_dict(torch.float16).items()}
        return Tuned(tuning.vectors.detach().to(comfy.model_management.intermediate_device()), file, outcome)

    def _load(self) -> None:
        comfy.model_management.load_models_gpu([self.model, self.clip.patcher], force_full_load=True)

    def _check_memory(self, settings: FinetuneSettings, latents: Tensor) -> None:
        trained = {
            FULL: sum(weight.numel() for weight in self.network.parameters()),
            LOW_RANK: count_lora_parameters(self.network, self.rank),
        }
        check_memory(self.model, trained, self.trains, (settings.batch_size, *latents.shape[1:]), self.saving)

    def _weights(self, seed: int) -> WholeUNet | LoRA:
        """What trains; in force inside a ``with``."""
        if self.trains == FULL:
            return WholeUNet(self.network, self.names)
        return LoRA(self.network, self.rank, seed, self.model.load_device, self.names)

    @contextmanager
    def _borrowed(self, weights: WholeUNet | LoRA) -> Iterator[None]:
        """Inside, the models are loaded, autograd reaches through them, and the weights are in force."""
        self._load()
        with trainable(self.network), trainable(self.clip.cond_stage_model), weights:
            yield

    def _steps(self, tuning: SubjectTuning, weights: WholeUNet | LoRA) -> Iterator[Step]:
        steps = tuning.steps()
        while True:
            with ExitStack() as stack:
                stack.enter_context(self._borrowed(weights))
                if self.saving:
                    stack.enter_context(gradient_checkpointing(self.network))
                step = next(steps, None)
            if step is None:
                return
            yield step

    @torch.no_grad()
    def _draw(self, tuning: SubjectTuning, prompts: Sequence[str], noise: Tensor, with_subject: bool) -> Tensor:
        """[P, 4, h, w], as the denoiser has latents."""
        vectors = tuning.vectors.detach()[: None if with_subject else 0]  # [16 or 0, width]
        texts = [compose_prompt(prompt, self.word) for prompt in prompts]
        encoders = [host_caption_encoder(self.clip, text, vectors.shape[-1]) for text in texts]
        contexts = torch.cat([encode(vectors) for encode in encoders])  # [P, 77, width]
        nothing = host_caption_encoder(self.clip, "", vectors.shape[-1])(vectors[:0])
        without = nothing.expand(len(prompts), -1, -1)

        def denoise(*inputs: Tensor) -> Tensor:
            if comfy.model_management.processing_interrupted():
                raise FinetuneCancelledError
            return tuning.denoiser(*inputs)

        return ddim_sample(
            denoise, without, contexts, noise, num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE
        )

    def _decode(self, latents: Tensor) -> Tensor:
        """[P, 4, h, w] -> [P, 3, H, W] in 0..1"""
        with torch.inference_mode():
            pictures = self.vae.decode(self.model.model.process_latent_out(latents))
        return rearrange(pictures.clone(), "b h w c -> b c h w").clamp(0, 1)

    def _look(self, pictures: Tensor, words: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            seen = self.qformer.look(rearrange(pictures, "b c h w -> b h w c"), words)
        return seen.clone().to("cpu")


def encode_pictures(vae: comfy.sd.VAE, images: Tensor, resolution: int, mirror: bool) -> Tensor:
    """The middle squares of pictures [N, H, W, C] through the VAE -> [N or 2N, 4, h, w], as the host keeps latents."""
    squares = comfy.utils.common_upscale(composite_alpha(images), resolution, resolution, "lanczos", "center")
    squares = torch.cat([squares, squares.flip(3)]) if mirror else squares
    return vae.encode(rearrange(squares, "b c h w -> b h w c"))


def diffusers_names(model: ModelPatcher) -> dict[str, str]:
    """The host's name of each of a U-Net's layers -> diffusers'."""
    diffusers_to_host = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    endings = (".weight", ".bias")
    return {
        host.removesuffix(ending): diffusers.removesuffix(ending)
        for diffusers, host in diffusers_to_host.items()
        for ending in endings
        if host.endswith(ending)
    }
