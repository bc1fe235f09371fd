"""Subject Fine-tune: the library's fine-tuning on the host's models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import cast

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
    FinetuneResult,
    FinetuneSettings,
    Step,
    StepCallback,
    SubjectTuning,
    check_count,
    check_size,
    finetune,
)
from ...blip_qformer.finetune.lora import LoRA, count_lora_parameters
from ...blip_qformer.finetune.snapshots import Snapshots
from ...blip_qformer.finetune.validation import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, Validation, validation_noise
from ...blip_qformer.prompt import compose_prompt
from ...blip_qformer.subject import Subject
from .autograd import (
    FullWeights,
    gradient_checkpointing,
    host_caption_encoder,
    host_denoiser,
    trainable,
    training_model,
)
from .cancelling import stop_when_cancelled
from .checks import require_additive_noise, require_clip_l, require_plain_sd15, require_same_latents
from .finetune_report import curve_image, describe_result, preview_image, show_progress
from .finetune_snapshots import snapshots_of
from .managed import ManagedEncoder, encode_views
from .training_models import GIGABYTE, room_beside, training_models

BYTES_PER_PARAMETER = 16  # in float32: the parameter, its gradient and AdamW's two moments

# Training keeps the activations that it goes back through: times what the host estimates for sampling.
ACTIVATION_FACTOR, ACTIVATION_FACTOR_CHECKPOINTED = 12, 3

log = logging.getLogger("blip_diffusion")


@dataclass(frozen=True)
class FinetuneOptions:
    """Which weights train and what is shown on the way; the hyperparameters are :class:`FinetuneSettings`.

    Args:
        trains: ``low-rank`` for a LoRA, ``full`` for the whole U-Net.
        rank: Rank of the LoRA.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        resolution: Edge in pixels of the squares that are learned.
        mirror: Whether mirrored images are learned too.
        validate_every: Number of steps between two validations; 0 means none.
        prompts: Validation prompts, a line each.
    """

    trains: str
    rank: int
    gradient_checkpointing: bool
    resolution: int
    mirror: bool
    validate_every: int
    prompts: str

    @property
    def validation_prompts(self) -> list[str]:
        """The prompts without empty lines."""
        return [line.strip() for line in self.prompts.splitlines() if line.strip()]


def finetune_subject(
    model: ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    qformer: ManagedEncoder,
    images: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    word: str,
    settings: FinetuneSettings,
    options: FinetuneOptions,
    graph: str = "",
) -> tuple[ModelPatcher, Subject, dict[str, Tensor], Tensor, Tensor, str]:
    """Fine-tune the model and the subject on a few images of it.

    Args:
        model: Model that stays as it is.
        clip: Text encoder of the same checkpoint.
        vae: VAE of the same checkpoint.
        qformer: Subject encoder of the same checkpoint.
        images: Images in batches of shape [B, H, W, C] in 0..1, each of a size of its own.
        masks: Masks, white where the subject is; only the encoder uses them. See :func:`~.lists.match_masks`.
        word: The subject's word.
        settings: Hyperparameters.
        options: Which weights train, and what is shown on the way.
        graph: Hash of the node with everything before it. Where it is known, a run that died goes on from its snapshot.

    Returns:
        The tuned model, the tuned subject, the weights as a LoRA file has them, the loss curve and the validation
        images as image batches, and a report in words.

    Raises:
        ValueError: The models or the images are not fit for it, or the device has too little memory.
    """
    require_plain_sd15(model)
    require_additive_noise(model)
    require_same_latents(vae, model)
    require_clip_l(clip, qformer.encoder.config.qformer.width)
    check_count(sum(map(len, images)))
    for batch in images:
        check_size(*batch.shape[1:3])
    untuned = encode_views(qformer, images, word, "crop", masks).average()
    vectors = untuned.vectors[0]  # [16, width]
    latents = encode_squares(vae, images, options.resolution, options.mirror)
    needed = require_memory(model, clip, options, (settings.batch_size, *latents.shape[1:]))
    with training_models(model, clip) as (own_model, own_clip):
        finetuner = HostFinetuner(own_model, own_clip, vae, qformer, word, options)
        finetuner.load(needed)
        networks = [finetuner.network, own_clip.cond_stage_model, vae.first_stage_model]
        hashes = qformer.encoder_hash, graph
        snapshots = snapshots_of(networks, hashes, images, masks, settings, options) if graph else None
        with torch.inference_mode(False):
            tuned = finetuner.tune(vectors.clone(), latents.clone(), settings, show_progress(settings.steps), snapshots)
    if not tuned.result.losses:  # nothing was learned that a later run could go on with
        comfy.model_management.throw_exception_if_processing_interrupted()
    patched = cast(ModelPatcher, comfy.sd.load_lora_for_models(model, None, tuned.weights, 1.0, 0.0)[0])
    subject = replace(untuned, vectors=tuned.vectors[None])
    curve, previews = curve_image(tuned.result), preview_image(tuned.result)
    if snapshots and not tuned.result.cancelled:
        snapshots.remove()
    return patched, subject, tuned.weights, curve, previews, describe_result(tuned.result, options.trains)


def encode_squares(vae: comfy.sd.VAE, batches: Sequence[Tensor], resolution: int, mirror: bool) -> Tensor:
    """Encode the middle squares of images.

    Args:
        vae: VAE of the host.
        batches: Images in batches of shape [B, H, W, C] in 0..1, each of a size of its own.
        resolution: Edge of the squares in pixels.
        mirror: Whether mirrored images follow.

    Returns:
        Latents of shape [N, 4, h, w], or [2 N, 4, h, w] with mirrored ones, as the host keeps latents.
    """
    squares = torch.cat(
        [
            comfy.utils.common_upscale(composite_alpha(images), resolution, resolution, "lanczos", "center")
            for images in batches
        ]
    )
    squares = torch.cat([squares, squares.flip(3)]) if mirror else squares
    return cast(Tensor, vae.encode(rearrange(squares, "b c h w -> b h w c")))


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What a fine-tuning has made.

    Args:
        vectors: The subject's vectors of shape [16, width].
        weights: Weights as a LoRA file has them.
        result: The course of the fine-tuning.
    """

    vectors: Tensor
    weights: dict[str, Tensor]
    result: FinetuneResult


class HostFinetuner:
    """Fine-tuning on the host's models, which are borrowed for each step and each validation, and given back.

    Args:
        model: Model that stays as it is.
        clip: Text encoder.
        vae: VAE, only for validation images.
        qformer: Subject encoder, only for validation.
        word: The subject's word.
        options: Which weights train, and what is shown on the way.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: comfy.sd.CLIP,
        vae: comfy.sd.VAE,
        qformer: ManagedEncoder,
        word: str,
        options: FinetuneOptions,
    ) -> None:
        self.model, self.clip, self.vae, self.qformer = training_model(model), clip, vae, qformer
        self.word, self.options = word, options
        self.names = diffusers_names(model)

    @property
    def network(self) -> nn.Module:
        """The U-Net."""
        return self.model.model.diffusion_model

    def load(self, needed: int = 0) -> None:
        """Load the models that train, with their patches.

        Args:
            needed: Bytes that are to be free beside them; the host unloads other models for it.
        """
        models = [self.model, self.clip.patcher]
        comfy.model_management.load_models_gpu(models, memory_required=needed, force_full_load=True)

    def tune(
        self,
        vectors: Tensor,
        latents: Tensor,
        settings: FinetuneSettings,
        on_step: StepCallback,
        snapshots: Snapshots | None,
    ) -> Finetuned:
        """Fine-tune; to be called outside inference mode, with the models loaded.

        Args:
            vectors: Mean of the images' subject vectors, of shape [16, width].
            latents: Latents of shape [N, 4, h, w], as the host keeps them.
            settings: Hyperparameters.
            on_step: Called after each step with the losses and all validation images so far.
            snapshots: Where to go on from, and where to save what is needed to go on.

        Returns:
            The tuned vectors, the weights and how the training went.
        """
        device, prompts = self.model.load_device, self.options.validation_prompts
        weights = self._new_weights(settings.seed)
        tuning = SubjectTuning(
            host_denoiser(self.model),
            weights.parameters,
            vectors.to(device),
            self.model.model.process_latent_in(latents.to(device, torch.float32)),
            host_caption_encoder(self.clip, f"a {self.word}", vectors.shape[-1]),
            settings,
            lora=self.options.trains == LOW_RANK,
        )

        @stop_when_cancelled()
        def sample(with_subject: bool) -> Tensor:
            noise = validation_noise(len(prompts), latents.shape[1:]).to(device)
            with self._borrow(weights):
                sampled = self._sample(tuning, prompts, noise, with_subject)
            return self._decode(sampled)

        def make_validation(baseline: Tensor) -> Validation:
            return Validation(self._encode_images, self.word, vectors, prompts, baseline)

        result = finetune(
            tuning,
            validate_every=self.options.validate_every if prompts else 0,
            sample=sample,
            make_validation=make_validation,
            steps=self._steps(tuning, weights),
            on_step=stop_when_cancelled()(on_step),
            snapshots=snapshots,
        )
        state_dict = {name: tensor.to("cpu") for name, tensor in weights.state_dict(torch.float16).items()}
        return Finetuned(tuning.vectors.detach().to(comfy.model_management.intermediate_device()), state_dict, result)

    def _new_weights(self, seed: int) -> FullWeights | LoRA:
        """Make the weights that train; they are active as a context manager."""
        if self.options.trains == FULL:
            return FullWeights(self.network, self.names)
        return LoRA(self.network, self.options.rank, seed, self.model.load_device, self.names)

    @contextmanager
    def _borrow(self, weights: FullWeights | LoRA) -> Iterator[None]:
        """Load the models, let autograd through them, and make the weights active."""
        self.load()
        with trainable(self.network), trainable(self.clip.cond_stage_model), weights:
            yield

    def _steps(self, tuning: SubjectTuning, weights: FullWeights | LoRA) -> Iterator[Step]:
        """Train, with the models borrowed only while a step is computed."""
        steps = tuning.steps()
        while True:
            with ExitStack() as stack:
                stack.enter_context(stop_when_cancelled())
                stack.enter_context(self._borrow(weights))
                if self.options.gradient_checkpointing:
                    stack.enter_context(gradient_checkpointing(self.network))
                step = next(steps, None)
            if step is None:
                return
            yield step

    @torch.no_grad()
    def _sample(self, tuning: SubjectTuning, prompts: Sequence[str], noise: Tensor, with_subject: bool) -> Tensor:
        """Sample an image for each prompt from noise [P, 4, h, w]; latents of that shape, as the U-Net gives them."""
        vectors = tuning.vectors.detach()[: None if with_subject else 0]  # [16 or 0, width]
        texts = [compose_prompt(prompt, self.word) for prompt in prompts]
        encoders = [host_caption_encoder(self.clip, text, vectors.shape[-1]) for text in texts]
        cond = torch.cat([encode(vectors) for encode in encoders])  # [P, 77, width]
        encode_nothing = host_caption_encoder(self.clip, "", vectors.shape[-1])
        uncond = encode_nothing(vectors[:0]).expand(len(prompts), -1, -1)  # [P, 77, width]

        @stop_when_cancelled()
        def denoiser(*inputs: Tensor) -> Tensor:
            return tuning.denoiser(*inputs)

        return ddim_sample(
            denoiser, uncond, cond, noise, num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE
        )

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents [P, 4, h, w] of the U-Net to images [P, 3, H, W] in 0..1."""
        with torch.inference_mode():
            images = self.vae.decode(self.model.model.process_latent_out(latents))
        return rearrange(images.clone(), "b h w c -> b c h w").clamp(0, 1)

    @stop_when_cancelled()
    def _encode_images(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """Encode images [P, 3, H, W], each with a word of its own, to vectors [P, 16, width]."""
        with torch.inference_mode():
            vectors = self.qformer.encode_with_words(rearrange(images, "b c h w -> b h w c"), words)
        return vectors.clone().to("cpu")


def require_memory(
    model: ModelPatcher, clip: comfy.sd.CLIP, options: FinetuneOptions, batch_shape: Sequence[int]
) -> int:
    """Refuse to begin what the device has too little memory for.

    Args:
        model: Model to fine-tune, loaded or not.
        clip: Text encoder, likewise.
        options: Which weights train, and how.
        batch_shape: Shape of a batch of latents.

    Returns:
        Bytes that training needs beside the models.

    Raises:
        ValueError: The mode needs more memory than is free; the message says how much each mode needs.
    """
    network, trains = model.model.diffusion_model, options.trains
    parameters = {
        FULL: sum(weight.numel() for weight in network.parameters()),
        LOW_RANK: count_lora_parameters(network, options.rank),
    }
    factor = ACTIVATION_FACTOR_CHECKPOINTED if options.gradient_checkpointing else ACTIVATION_FACTOR
    activations = model.model.memory_required(list(batch_shape)) * factor
    needs = {name: count * BYTES_PER_PARAMETER + activations for name, count in parameters.items()}
    free = room_beside(model, clip)
    log.info(
        "Fine-tuning (%s) needs about %.1f GB; %.1f GB are free.", trains, needs[trains] / GIGABYTE, free / GIGABYTE
    )
    if needs[trains] <= free:
        return round(needs[trains])
    others = [f"{name} needs {need / GIGABYTE:.1f} GB" for name, need in needs.items() if name != trains]
    raise ValueError(
        f"Fine-tuning ({trains}) needs about {needs[trains] / GIGABYTE:.1f} GB beside the models, and "
        f"{model.load_device} has {max(free, 0) / GIGABYTE:.1f} GB free: take a smaller batch_size or resolution, or "
        f"another mode ({', '.join(others)})."
    )


def diffusers_names(model: ModelPatcher) -> dict[str, str]:
    """Map the host's name of each of a U-Net's layers to diffusers'.

    Args:
        model: Model of the host.

    Returns:
        Host's name -> diffusers' name, both without ``.weight`` and ``.bias``.
    """
    diffusers_to_host = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    endings = (".weight", ".bias")
    return {
        host.removesuffix(ending): diffusers.removesuffix(ending)
        for diffusers, host in diffusers_to_host.items()
        for ending in endings
        if host.endswith(ending)
    }
