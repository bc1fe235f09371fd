"""Read the structure of a network off the keys and shapes of its state dict: modules, numbers of layers, sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor


def has_module(keys: Collection[str], module: str) -> bool:
    """Return whether a module has any tensors."""
    return any(key.startswith(f"{module}.") for key in keys)


def count_children(keys: Collection[str], module: str) -> int:
    """Return how many children ``module.0``, ``module.1``, ... there are.

    Args:
        keys: The keys of a state dict.
        module: The name of the parent.
    """
    count = 0
    while has_module(keys, f"{module}.{count}"):
        count += 1
    return count


def shape_of(state_dict: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Return the shape of a tensor that tells a size.

    Raises:
        ValueError: The tensor is not there.
    """
    if key not in state_dict:
        raise ValueError(f"The weights hold no {key}, which tells the model's size: use weights in diffusers' names.")
    return tuple(state_dict[key].shape)


def without_text_model_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP text model's state dict without the leading ``text_model.``, which newer files lack."""
    return {key.removeprefix("text_model."): tensor for key, tensor in state_dict.items()}
