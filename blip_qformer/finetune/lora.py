"""Low-rank adaptation (arXiv 2106.09685) of a U-Net's attention: a file of a few megabytes instead of a U-Net.

It works on any network whose attention layers carry SD's names, the host's as well as diffusers': it listens at their
projections and adds to what they give out. Nothing of the network is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import TracebackType
from zlib import crc32

import torch
from torch import Tensor, nn

RANK = 16


PROJECTIONS = re.compile(r"\battn[12]\.(to_q|to_k|to_v|to_out\.0)$")


class LoRA:
    """Factors beside every attention projection of a network, in force inside a ``with``.

    With the up factors at zero they change nothing, which is how they begin.

    Args:
        network: its attention projections are linear layers named ``...attn1.to_q`` and so on.
        rank: of what is added; alpha equals it, so that a strength of 1 is what was trained.
        seed: of the down factors.
        device: where the factors live, float32.
        names: what :func:`lora_name` has to be told: the network's name of a layer -> diffusers'. None: they are the
            same.

    Raises:
        ValueError: the network has no such layers, or the rank is not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int = RANK,
        seed: int = 0,
        device: torch.device | str = "cpu",
        names: Mapping[str, str] | None = None,
    ):
        if rank < 1:
            raise ValueError(
                f"The rank is {rank}, but low-rank factors have one of 1 or more: {RANK} suits most subjects."
            )
        self.layers = {name: module for name, module in network.named_modules() if PROJECTIONS.search(name)}
        if not self.layers:
            raise ValueError("This model has no attention layers of SD1.5's names to adapt: choose full instead.")
        self.lora_names = {name: lora_name(names[name] if names else name) for name in self.layers}
        self.down, self.up = {}, {}
        for name, layer in self.layers.items():
            outwards, inwards = layer.weight.shape
            # A source for each layer: networks list the same layers in different orders.
            source = torch.Generator().manual_seed(seed * 1_000_003 + crc32(self.lora_names[name].encode()))
            # As nn.Linear begins: uniform with a bound of one over the root of its inputs.
            down = (torch.rand(rank, inwards, generator=source) * 2 - 1) / inwards**0.5
            self.down[name] = nn.Parameter(down.to(device))
            self.up[name] = nn.Parameter(torch.zeros(outwards, rank, device=device))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All factors."""
        return [*self.down.values(), *self.up.values()]

    def __enter__(self) -> LoRA:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._adding(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def file(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The factors as a LoRA file has them, with the names that the stock LoraLoader and other programs know."""
        tensors = {}
        for name, file_name in self.lora_names.items():
            rank = self.down[name].shape[0]
            tensors[f"{file_name}.lora_down.weight"] = self.down[name].detach().to(dtype)
            tensors[f"{file_name}.lora_up.weight"] = self.up[name].detach().to(dtype)
            tensors[f"{file_name}.alpha"] = torch.tensor(float(rank), dtype=dtype)
        return tensors

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        down, up = self.down[name], self.up[name]

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + inputs[0] @ down.to(output.dtype).T @ up.to(output.dtype).T

        return add


def count_factors(network: nn.Module, rank: int) -> int:
    """How many numbers :class:`LoRA` trains."""
    layers = (module for name, module in network.named_modules() if PROJECTIONS.search(name))
    return rank * sum(sum(layer.weight.shape) for layer in layers)


def lora_name(diffusers_name: str) -> str:
    """A U-Net's layer in a LoRA file: ``lora_unet_`` and diffusers' name of it with underscores."""
    return f"lora_unet_{diffusers_name.replace('.', '_')}"


def difference_file(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What full training changed, as the stock LoraLoader reads it: ``.diff`` for weights and ``.diff_b`` for biases.

    Args:
        before, after: the U-Net's tensors in the network's own names.
        names: the network's name of a layer -> diffusers'.
    """
    tensors = {}
    for name, trained in after.items():
        layer, _, kind = name.rpartition(".")
        change = trained.detach().float() - before[name].detach().to(trained.device).float()
        tensors[f"{lora_name(names[layer])}.{'diff' if kind == 'weight' else 'diff_b'}"] = change.to(dtype)
    return tensors
