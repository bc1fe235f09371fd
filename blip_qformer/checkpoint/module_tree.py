"""Read the structure of a network off the keys and shapes of its state dict: modules, numbers of layers, sizes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

from torch import Tensor

from ..limits import MAX_LAYERS, MAX_VOCABULARY


def has_module(keys: Collection[str], module: str) -> bool:
    """Return whether a module has any tensors."""
    return any(key.startswith(f"{module}.") for key in keys)


def count_children(keys: Collection[str], module: str) -> int:
    """Return how many children ``module.0``, ``module.1``, ... there are.

    Args:
        keys: The keys of a state dict.
        module: The name of the parent.

    Raises:
        ValueError: There are more than any network has.
    """
    prefix = f"{module}."
    children = {key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)}
    count = next(number for number in itertools.count() if str(number) not in children)
    if count > MAX_LAYERS:
        raise ValueError(f"The weights hold {count} {module}, and no model of this kind has more than {MAX_LAYERS}.")
    return count


def shape_of(state_dict: Mapping[str, Tensor], key: str, *axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor that tells a size.

    Args:
        state_dict: The weights.
        key: The tensor's key.
        axes: The numbers of axes that it may have.

    Raises:
        ValueError: The tensor is not there, has other axes, or a size that no network has.
    """
    if key not in state_dict:
        raise ValueError(f"The weights hold no {key}, which tells the model's size: use weights in diffusers' names.")
    shape = tuple(state_dict[key].shape)
    if len(shape) not in axes or not all(1 <= size <= MAX_VOCABULARY for size in shape):
        needed = " or ".join(map(str, axes))
        raise ValueError(f"The weights hold {key} of shape {list(shape)}, where {needed} sizes are needed: use others.")
    return shape


def without_text_model_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP text model's state dict without the leading ``text_model.``, which newer files lack."""
    return {key.removeprefix("text_model."): tensor for key, tensor in state_dict.items()}
