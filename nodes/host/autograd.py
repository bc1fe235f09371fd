"""The host's U-Net and text encoder under autograd: borrowed for a training step, and given back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

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

CHECKPOINTED_BLOCKS = ("ResBlock", "SpatialTransformer")  # classes of the U-Net's blocks


@contextmanager
def trainable(network: nn.Module, trained: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Let autograd through a network that the host loaded in inference mode; its own weights are back afterwards.

    Weights that do not train keep their memory, which is seen through a tensor that autograd accepts.

    Args:
        network: Network as the host loaded it.
        trained: Parameters that take the place of the network's, by their names.
    """
    trained = trained or {}
    originals = []
    try:
        for path, module in network.named_modules():
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                originals.append((module, name, weight))
                replacement = trained.get(f"{path}.{name}" if path else name)
                module._parameters[name] = _frozen(weight) if replacement is None else replacement
        yield
    finally:
        for module, name, weight in originals:
            module._parameters[name] = weight


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(ordinary_view(weight), requires_grad=False)


def ordinary_view(tensor: Tensor) -> Tensor:
    """View a tensor's memory through one that was not made in inference mode.

    Args:
        tensor: Tensor of any kind.
    """
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class FullWeights:
    """Float32 copies of all of a U-Net's weights, which train in place of the host's own as a context manager.

    Args:
        network: U-Net as the host loaded it.
        names: The network's name of a layer -> diffusers'.
    """

    def __init__(self, network: nn.Module, names: Mapping[str, str]) -> None:
        self.network, self.names = network, names
        self.trained = {
            name: nn.Parameter(ordinary_view(weight).to(torch.float32, copy=True))
            for name, weight in network.named_parameters()
        }
        self._stack = ExitStack()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All weights."""
        return list(self.trained.values())

    def __enter__(self) -> FullWeights:
        self._stack.enter_context(trainable(self.network, self.trained))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the difference to the host's weights as the stock LoraLoader reads it; not inside the context.

        Args:
            dtype: Precision of the tensors.
        """
        return difference_state_dict(dict(self.network.named_parameters()), self.trained, self.names, dtype)


@contextmanager
def gradient_checkpointing(network: nn.Module) -> Iterator[None]:
    """Recompute the insides of a U-Net's blocks in the backward pass, as the stock Train LoRA does.

    Args:
        network: U-Net of the host.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in CHECKPOINTED_BLOCKS]
    try:
        for block in blocks:
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance's: the class's is found again


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def training_model(model: ModelPatcher) -> ModelPatcher:
    """Return the model in the precision it trains in.

    That is bfloat16 where the host would compute in half precision and the device supports it, else float32.

    Args:
        model: Model that stays as it is.
    """
    precision = model.model.manual_cast_dtype or model.model.get_dtype()
    if precision == torch.float32 == model.model.get_dtype():
        return model
    device = model.load_device
    half = precision != torch.float32 and comfy.model_management.should_use_bf16(device)
    cast = model.clone()
    cast.set_model_compute_dtype(torch.bfloat16 if half else torch.float32)
    return cast


def host_denoiser(model: ModelPatcher) -> Denoiser:
    """Return the host's model as a function that predicts the noise in noisy latents.

    Args:
        model: Model that is loaded already.
    """
    options = {**model.model_options.get("transformer_options", {})}
    # The host's own choice on a CPU writes into its results in place, which autograd refuses.
    attention = comfy.ldm.modules.attention.attention_pytorch
    options["optimized_attention_override"] = lambda _, *args, **kwargs: attention(*args, **kwargs)

    def predict_noise(noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        alphas_cumprod = rearrange(ALPHAS_CUMPROD.to(noisy_latents.device)[timesteps], "b -> b 1 1 1")
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()  # [B, 1, 1, 1]
        x = noisy_latents / alphas_cumprod.sqrt()  # the host's noisy latents are x_0 + sigma * noise
        flat = sigmas.flatten()  # [B]
        x0 = model.model.apply_model(x, flat, c_crossattn=context, transformer_options={**options, "sigmas": flat})
        return (x - x0) / sigmas

    return predict_noise


def host_caption_encoder(clip: comfy.sd.CLIP, caption: str, width: int) -> CaptionEncoder:
    """Return the host's text encoder as a function of the subject's vectors in one caption, differentiable in them.

    Args:
        clip: Text encoder that is loaded already.
        caption: Text whose first word the subject follows.
        width: Width of the vectors.
    """
    tokens = read_tokens(clip, caption, width)

    def encode(vectors: Tensor) -> Tensor:
        encoder = clip.cond_stage_model
        encoder.reset_clip_options()
        if clip.layer_idx is not None:
            encoder.set_clip_options({"layer": clip.layer_idx})
        encoder.set_clip_options({"execution_device": clip.patcher.load_device})
        blocks, _ = host_tokens(clip, insert_subject(tokens, vectors), "truncate")
        with torch.autograd.graph.saved_tensors_hooks(_copy_activation, lambda tensor: tensor):
            return encoder.encode_token_weights(blocks)[0]  # [1, 77, width]

    return encode


def _copy_activation(tensor: Tensor) -> Tensor:
    """Copy what autograd saves, unless it is a weight: the text encoder's layers add to their input in place."""
    owner = tensor._base if tensor._is_view() else tensor
    return tensor if isinstance(owner, nn.Parameter) else tensor.clone()
