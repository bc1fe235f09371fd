"""Low-rank adaptation (arXiv 2106.09685) of a U-Net's attention: a file of a few megabytes instead of a U-Net.

It works on any network whose attention layers carry SD's names, the host's as well as diffusers': forward hooks add to
the outputs of the attention projections, and nothing of the network is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import cast
from zlib import crc32

import torch
from torch import Tensor, nn

RANK = 16
PROJECTIONS = re.compile(r"\battn[12]\.(to_q|to_k|to_v|to_out\.0)$")


class LoRA:
    """Low-rank factors beside every attention projection of a network, active as a context manager.

    The up factors begin at zero, so that nothing changes before training. Alpha equals the rank, so that a strength of
    1 is what was trained.

    Args:
        network: A U-Net whose attention projections are linear layers named ``...attn1.to_q`` and so on.
        rank: Rank of the factors.
        seed: Seed of the down factors.
        device: Device of the factors, which are float32.
        names: The network's name of a layer -> diffusers'; None if they are the same.

    Raises:
        ValueError: If the network has no such layers, or the rank is not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int = RANK,
        seed: int = 0,
        device: torch.device | str = "cpu",
        names: Mapping[str, str] | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(
                f"The rank is {rank}, but low-rank factors have one of 1 or more: {RANK} suits most subjects."
            )
        self.layers = attention_projections(network)
        if not self.layers:
            raise ValueError("This model has no attention layers of SD1.5's names to adapt: choose full instead.")
        self.keys = {name: lora_key(names[name] if names else name) for name in self.layers}
        self.down: dict[str, nn.Parameter] = {}
        self.up: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            out_features, in_features = layer.weight.shape
            # A generator for each layer: networks list the same layers in different orders.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + crc32(self.keys[name].encode()))
            # Initialised as nn.Linear is: uniform within one over the root of its inputs.
            down = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / in_features**0.5
            self.down[name] = nn.Parameter(down.to(device))
            self.up[name] = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All factors, the down factors first."""
        return [*self.down.values(), *self.up.values()]

    def __enter__(self) -> LoRA:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._forward_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Collect the factors under the keys that the stock LoraLoader and other programs know.

        Args:
            dtype: Precision of the tensors.

        Returns:
            The tensors of a LoRA file.
        """
        tensors = {}
        for name, key in self.keys.items():
            rank = self.down[name].shape[0]
            tensors[f"{key}.lora_down.weight"] = self.down[name].detach().to(dtype)
            tensors[f"{key}.lora_up.weight"] = self.up[name].detach().to(dtype)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=dtype)
        return tensors

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        down, up = self.down[name], self.up[name]

        def add_low_rank(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + inputs[0] @ down.to(output.dtype).T @ up.to(output.dtype).T

        return add_low_rank


def attention_projections(network: nn.Module) -> dict[str, nn.Linear]:
    """Find the layers that :class:`LoRA` adapts.

    Args:
        network: A U-Net.

    Returns:
        The layers by their names in the network.
    """
    return {name: cast(nn.Linear, module) for name, module in network.named_modules() if PROJECTIONS.search(name)}


def count_lora_parameters(network: nn.Module, rank: int) -> int:
    """Count the numbers that a :class:`LoRA` of a network trains.

    Args:
        network: A U-Net.
        rank: Rank of the factors.
    """
    return rank * sum(sum(layer.weight.shape) for layer in attention_projections(network).values())


def lora_key(diffusers_name: str) -> str:
    """Return the key prefix of a U-Net's layer in a LoRA file, without ``.lora_down.weight`` and the like.

    Args:
        diffusers_name: The layer's name in diffusers' U-Net.
    """
    return f"lora_unet_{diffusers_name.replace('.', '_')}"


def difference_state_dict(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return what full training changed, as the stock LoraLoader reads it: ``.diff`` of weights, ``.diff_b`` of biases.

    Args:
        before: The U-Net's tensors before training, under the network's own names.
        after: The same after training.
        names: The network's name of a layer -> diffusers'.
        dtype: Precision of the differences, which are computed in float32.

    Returns:
        The tensors of a LoRA file.
    """
    tensors = {}
    for name, trained in after.items():
        layer, _, kind = name.rpartition(".")
        change = trained.detach().float() - before[name].detach().to(trained.device).float()
        tensors[f"{lora_key(names[layer])}.{'diff' if kind == 'weight' else 'diff_b'}"] = change.to(dtype)
    return tensors
