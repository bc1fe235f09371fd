"""The host's models under autograd: what fine-tuning borrows for a while, and gives back as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...blip_qformer.diffusion.noise_schedule import ALPHAS_CUMPROD, Denoiser
from ...blip_qformer.finetune.loop import CaptionEncoder
from ...blip_qformer.finetune.lora import difference_state_dict
from ...blip_qformer.prompt import insert_subject
from .conditioning import host_tokens, read_tokens

CHECKPOINTED = ("ResBlock", "SpatialTransformer")  # the U-Net's blocks, whose insides are computed again going back


BYTES_TRAINED = 16  # for each number that trains, in float32: itself, its gradient and AdamW's two means


GIGABYTE = 1024**3


# Of what the host reckons drawing needs, fine-tuning needs about so much more: it keeps what it will go back through.
ACTIVATIONS, ACTIVATIONS_CHECKPOINTED = 12, 3


log = logging.getLogger("blip_diffusion")


@contextmanager
def trainable(network: nn.Module, trained: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Let autograd through a network that the host loaded in inference mode, and put some weights of ours in it.

    What does not train is the same memory seen through a tensor that autograd accepts. Whatever happens inside, the
    network has its own weights again afterwards.

    Args:
        trained: name of a parameter -> what takes its place.
    """
    trained = trained or {}
    kept = []
    try:
        for path, module in network.named_modules():
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                full_name = f"{path}.{name}" if path else name
                kept.append((module, name, weight))
                ours = trained.get(full_name)
                module._parameters[name] = _frozen(weight) if ours is None else ours
        yield
    finally:
        for module, name, weight in kept:
            module._parameters[name] = weight


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(ordinary_view(weight), requires_grad=False)


def ordinary_view(tensor: Tensor) -> Tensor:
    """The same numbers in the same memory, as a tensor that was not made in inference mode."""
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class WholeUNet:
    """A U-Net's weights in float32, which train in place of the host's own inside a ``with``.

    Args:
        network: as the host loaded it, with its own weights.
        names: its name of a layer -> diffusers'.
    """

    def __init__(self, network: nn.Module, names: Mapping[str, str]):
        self.network, self.names = network, names
        self.masters = {
            name: nn.Parameter(ordinary_view(weight).to(torch.float32, copy=True))
            for name, weight in network.named_parameters()
        }
        self._stack = ExitStack()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All weights."""
        return list(self.masters.values())

    def __enter__(self) -> WholeUNet:
        self._stack.enter_context(trainable(self.network, self.masters))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What changed, as the stock LoraLoader reads it; outside the ``with``."""
        return difference_state_dict(dict(self.network.named_parameters()), self.masters, self.names, dtype)


@contextmanager
def gradient_checkpointing(network: nn.Module) -> Iterator[None]:
    """Let a U-Net's blocks forget what is inside them and compute it again going back, as the stock Train LoRA does."""
    blocks = [module for module in network.modules() if type(module).__name__ in CHECKPOINTED]
    try:
        for block in blocks:
            block.forward = _forgetting(block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward  # of the instance: its class's is there again


def _forgetting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **named: checkpoint(forward, *arguments, use_reentrant=False, **named)


def training_model(model: ModelPatcher) -> ModelPatcher:
    """The model as it trains: in bfloat16 where the device computes in half precision and knows it, else in float32."""
    precision = model.model.manual_cast_dtype or model.model.get_dtype()
    if precision == torch.float32 == model.model.get_dtype():
        return model
    device = model.load_device
    half = precision != torch.float32 and comfy.model_management.should_use_bf16(device)
    cast = model.clone()
    cast.set_model_compute_dtype(torch.bfloat16 if half else torch.float32)
    return cast


def host_denoiser(model: ModelPatcher) -> Denoiser:
    """The host's model as fine-tuning asks for it: noise from noisy latents, as a Stable Diffusion counts timesteps."""
    options = {**model.model_options.get("transformer_options", {})}
    # The host's own choice on a CPU writes into its results in place, which autograd refuses.
    attention = comfy.ldm.modules.attention.attention_pytorch
    options["optimized_attention_override"] = lambda _, *arguments, **named: attention(*arguments, **named)

    def denoise(noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        shares = rearrange(ALPHAS_CUMPROD.to(noisy.device)[timesteps], "b -> b 1 1 1")
        sigmas = ((1 - shares) / shares).sqrt()  # [B, 1, 1, 1]
        scaled = noisy / shares.sqrt()  # the host's noisy latent is the picture's plus sigma times noise
        flat = sigmas.flatten()
        denoised = model.model.apply_model(
            scaled, flat, c_crossattn=context, transformer_options={**options, "sigmas": flat}
        )
        return (scaled - denoised) / sigmas

    return denoise


def host_caption_encoder(clip: comfy.sd.CLIP, caption: str, width: int) -> CaptionEncoder:
    """The host's text encoder for one caption with given vectors in it; its model must be loaded already."""
    tokens = read_tokens(clip, caption, width)

    def encode(vectors: Tensor) -> Tensor:
        encoder = clip.cond_stage_model
        encoder.reset_clip_options()
        if clip.layer_idx is not None:
            encoder.set_clip_options({"layer": clip.layer_idx})
        encoder.set_clip_options({"execution_device": clip.patcher.load_device})
        filled, _ = host_tokens(clip, insert_subject(tokens, vectors), "truncate")
        with torch.autograd.graph.saved_tensors_hooks(_kept, lambda tensor: tensor):
            return encoder.encode_token_weights(filled)[0]  # [1, 77, width]

    return encode


def _kept(tensor: Tensor) -> Tensor:
    """What autograd keeps of the text encoder, whose layers add to their input in place; weights stay as they are."""
    owner = tensor._base if tensor._is_view() else tensor
    return tensor if isinstance(owner, nn.Parameter) else tensor.clone()


def check_memory(model: ModelPatcher, trained: Mapping[str, int], mode: str, shape: Sequence[int], saved: bool) -> None:
    """Refuse to begin what the device has no memory for.

    Args:
        model: loaded already.
        trained: numbers that train, for each mode there is.
        shape: of a batch of latents.
        saved: whether gradient checkpointing is on.

    Raises:
        ValueError: it needs more than is free; says how much each mode needs.
    """
    device = model.load_device
    activations = model.memory_required(list(shape)) * (ACTIVATIONS_CHECKPOINTED if saved else ACTIVATIONS)
    needs = {name: count * BYTES_TRAINED + activations for name, count in trained.items()}
    free = comfy.model_management.get_free_memory(device)
    log.info("Fine-tuning (%s) needs about %.1f GB; %.1f GB are free.", mode, needs[mode] / GIGABYTE, free / GIGABYTE)
    if needs[mode] <= free:
        return
    others = [f"{name} needs {need / GIGABYTE:.1f} GB" for name, need in needs.items() if name != mode]
    raise ValueError(
        f"Fine-tuning ({mode}) needs about {needs[mode] / GIGABYTE:.1f} GB beside the models, and {device} has "
        f"{free / GIGABYTE:.1f} GB free: take a smaller batch_size or resolution, or another mode "
        f"({', '.join(others)})."
    )
