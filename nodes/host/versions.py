"""Differences between versions of ComfyUI that the nodes meet; what tests and tools meet is in tools/host_versions.py.

Each difference says in which version it came. It is found by looking at the host, not at its number: hosts are also
taken from between two versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import ClipTarget
from comfy_api.v0_0_2 import io
from torch import Tensor, nn

#: Fields that the host's ``Schema`` has: ``search_aliases`` since 0.11.0, ``essentials_category`` since 0.15.0.
SCHEMA_FIELDS = frozenset(field.name for field in fields(io.Schema))


def newer_fields(search_aliases: Sequence[str], essentials_category: str | None = None) -> dict[str, Any]:
    """Return those of a schema's newer fields that this host knows.

    Args:
        search_aliases: Words that people look for the node by, other than those of its name.
        essentials_category: Group of the frontend's Essentials tab; None leaves the node out of it.
    """
    values = {"search_aliases": list(search_aliases), "essentials_category": essentials_category}
    return {name: value for name, value in values.items() if name in SCHEMA_FIELDS}


def patcher_class(disable_dynamic: bool = False) -> type[ModelPatcher]:
    """Return the class of patchers that the host makes of a model.

    Since 0.12.0 that is ``CoreModelPatcher``, which the host's start sets to ``ModelPatcherDynamic`` where memory is
    dynamic. That class itself gives models on the CPU a plain patcher.

    Args:
        disable_dynamic: Whether weights must not be dynamic, whatever the host does.
    """
    return ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Return whether a model's weights stay in their mapped file until a layer runs; since 0.12.0.

    Args:
        patcher: Model.
    """
    ask = getattr(patcher, "is_dynamic", None)
    return ask is not None and ask()


def static_copy(patcher: ModelPatcher) -> ModelPatcher:
    """Load a dynamic model once more from its file, with its patches, as one that stays in place while it is loaded.

    Args:
        patcher: Dynamic model that knows its file.
    """
    options = {"disable_dynamic": True}  # older hosts have no such argument, and no dynamic models
    return patcher.clone(**options)


def share_static_copy(clone: ModelPatcher) -> None:
    """Let a clone of a dynamic MODEL take its static copy from that MODEL, and so do all clones of the clone.

    Since 0.16.0 the host keeps with each patcher the static copy that it loaded for runs with hooks
    (``get_non_dynamic_delegate``), but gives it to no clone: what a node clones at each of its runs is loaded anew.

    Args:
        clone: What ``clone()`` returned; unchanged where the host has no such copies or the MODEL is not dynamic.
    """
    if is_dynamic(clone) and hasattr(clone, "get_non_dynamic_delegate"):
        clone.__class__ = _sharing_class(type(clone))  # clones have the same class, but no attributes of ours


@cache
def _sharing_class(base: Any) -> Any:
    """Make the class of patchers that take their static copy from what they were cloned from; once for each base."""
    if getattr(base, "shares_static_copy", False):
        return base

    class SharesStaticCopy(base):
        shares_static_copy = True

        def get_non_dynamic_delegate(self) -> Any:
            """Return a copy that is not dynamic, with the patches and wrappers of this one."""
            if getattr(self.parent, "model", None) is not self.model:  # a clone for another device
                return super().get_non_dynamic_delegate()
            static = self.parent.get_non_dynamic_delegate()  # loaded at the first time, and kept there
            return self.clone(disable_dynamic=True, model_override=static.get_clone_model_override())

    return SharesStaticCopy


def remember_loader(patcher: ModelPatcher, load: Callable[..., ModelPatcher], *arguments: Any) -> None:
    """Tell the host how the same model is loaded once more from the same files.

    Since 0.15.1 the host does so for weights of its own, with ``disable_dynamic=True``, where it may not touch dynamic
    ones (Train LoRA, LoRA hooks, torch.compile); since 0.23.0, without that, for a copy on another device.

    Args:
        patcher: Model.
        load: Function that takes the arguments and ``disable_dynamic``.
        arguments: Its arguments. They are kept as long as the model, and so must hold no weights.
    """
    vars(patcher)["cached_patcher_init"] = (load, arguments)


def dynamic_option(loader: Callable[..., Any], disable_dynamic: bool) -> dict[str, bool]:
    """Return the argument by which one of the host's loaders leaves out dynamic memory, if it has one.

    ``load_diffusion_model_state_dict`` has it since 0.15.1, ``CLIP`` since 0.16.0.

    Args:
        loader: Function or class of the host.
        disable_dynamic: Value of the argument.
    """
    known = "disable_dynamic" in inspect.signature(loader).parameters
    return {"disable_dynamic": disable_dynamic} if known else {}


def clip_with_weights(
    target: ClipTarget, state_dict: dict[str, Tensor], disable_dynamic: bool, **options: Any
) -> comfy.sd.CLIP:
    """Make a CLIP that has its weights.

    Since 0.4.0 ``CLIP`` takes them, and must be given them: where the text encoder is made on the device that it runs
    on, it fetches what weights it has at once, and would later bring those back in place of any that came after.

    Args:
        target: Classes of the tokenizer and of the text encoder.
        state_dict: Weights in the names of the text encoder.
        disable_dynamic: Whether its memory must not be dynamic, whatever the host does.
        options: Further arguments of ``CLIP``.
    """
    options |= dynamic_option(comfy.sd.CLIP, disable_dynamic)
    if "state_dict" in inspect.signature(comfy.sd.CLIP).parameters:
        options["state_dict"] = state_dict
        return comfy.sd.CLIP(target, **options)
    clip = comfy.sd.CLIP(target, **options)
    clip.load_sd(state_dict, full_model=True)
    return clip


def archive_dtypes(network: nn.Module) -> None:
    """Let the host remember which precision weights get when a layer fetches them; since 0.12.0.

    Args:
        network: Network that has no weights of the file yet, which may have another precision.
    """
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:
        archive(network)
