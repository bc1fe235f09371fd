"""How a value in a conditioning, and the wrapper that reads it, come to a sampling run.

The wrapper, of the host's type ``OUTER_SAMPLE``, travels in one of two ways:

- in a hook of the conditioning. This needs no further wire, but where the host's memory is dynamic, it loads the
  checkpoint a second time, without dynamic memory, for every conditioning with hooks (``CFGGuider.inner_set_conds``).
- in a MODEL (:func:`wrap_model`). The conditioning then holds the value alone, and nothing is loaded again.

Both may meet in one run: the first wrapper that the host calls removes the values, and the next one finds none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import comfy.conds
import comfy.hooks
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker

from ..conditioning import Conditioning
from ..versions import share_static_copy

NO_MODEL = (
    "This node's model output is empty, because nothing is connected to its model input: connect the model there, or "
    "take the sampler's model from where it came before."
)


class MissingWrapper(comfy.conds.CONDRegular):
    """Stands in for a value whose wrapper is in a MODEL, and refuses to be sampled by a model without it."""

    def __init__(self) -> None:
        super().__init__(None)

    def process_cond(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a call of the model; a wrapper would have removed this before the first one.

        Args:
            *args: The host's.
            **kwargs: The host's.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "The sampler's positive or negative comes from an attention node whose model input is connected, but the "
            "sampler's model does not: connect that node's model output to the sampler, or disconnect its model input."
        )


MISSING_WRAPPER = MissingWrapper()


def attach(
    conditioning: Conditioning, key: str, values: Sequence[Any], wrapper: Callable, *, in_model: bool
) -> Conditioning:
    """Return a copy of a conditioning that carries values and has the sampling run wrapped.

    Args:
        conditioning: Conditioning with or without hooks of others.
        key: Key of the entries' dictionaries for the values, and reference of the hook.
        values: Value for each entry.
        wrapper: Wrapper of type ``OUTER_SAMPLE``.
        in_model: Whether the wrapper is in the MODEL that the sampler gets, so that no hook has to bring it.

    Returns:
        A conditioning of the same tensors; the given one stays as it is.
    """
    marked = [[tensor, {**options, key: value}] for (tensor, options), value in zip(conditioning, values, strict=True)]
    if in_model:
        for _, options in marked:
            remove_hook(options, key)
            options["model_conds"] = options.get("model_conds", {}).copy()  # of its own kind, see subject_rows
            options["model_conds"][key] = MISSING_WRAPPER
        return marked
    hook = comfy.hooks.TransformerOptionsHook({"wrappers": {WrappersMP.OUTER_SAMPLE: {key: [wrapper]}}})
    # The host compares hooks by this: ours are all one, however many conditionings bring it.
    hook.hook_ref = key  # pyright: ignore[reportAttributeAccessIssue]  # any value that can be compared and hashed
    return comfy.hooks.set_hooks_for_conditioning(marked, group_hooks([hook]))


def wrap_model(model: ModelPatcher | None, key: str, wrapper: Callable) -> ModelPatcher | ExecutionBlocker:
    """Return a copy of a MODEL, with the same weights, that brings the wrapper for values in conditionings.

    Args:
        model: Model that a sampler will run; None where a node's optional input is not connected.
        key: Key as in :func:`attach`.
        wrapper: Wrapper of type ``OUTER_SAMPLE``.

    Returns:
        The copy. Without a model, what the host shows as an error at the node that takes it.
    """
    if model is None:
        return ExecutionBlocker(NO_MODEL)
    model = model.clone()
    share_static_copy(model)  # hooks of others, such as a LoRA's, still need one
    if wrapper not in model.get_wrappers(WrappersMP.OUTER_SAMPLE, key):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, wrapper)
    return model


def detach(guider: comfy.samplers.CFGGuider, key: str) -> list[tuple[str, dict[str, Any], Any]]:
    """Remove values and what came with them from the conditionings of a run.

    The host samples conditionings with different hooks one after the other. Without ours, those whose other hooks are
    the same share one group again, so that positive and negative stay one batch.

    Args:
        guider: Guider of the run, whose conditionings are its own copies.
        key: Key and hook reference as in :func:`attach`.

    Returns:
        For each entry that had a value: the side it stands on, such as ``positive``, the entry, and the value.
    """
    entries = [(side, entry) for side, entries in guider.conds.items() for entry in entries]
    detached = [(side, entry, entry.pop(key)) for side, entry in entries if key in entry]
    for _, entry, _ in detached:  # the dictionary of model_conds is shared with the caller's conditioning
        entry["model_conds"] = entry["model_conds"].copy()
        entry["model_conds"].pop(key, None)
    if any([remove_hook(entry, key) for _, entry in entries]):
        share_hook_groups([entry for _, entry in entries])
        # The host had counted ours when it chose to cache the hooks' weights; it restores its choice after the run.
        if comfy.samplers.get_total_hook_groups_in_conds(guider.conds) <= 1:
            guider.model_patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    return detached


def remove_hook(options: dict[str, Any], key: str) -> bool:
    """Remove our hook from an entry of a conditioning, and the host's key for hooks if there are no others.

    Args:
        options: Dictionary of the entry, changed in place.
        key: Reference of the hook.

    Returns:
        Whether there was one.
    """
    hooks = getattr(options.get("hooks"), "hooks", [])
    others = [hook for hook in hooks if hook.hook_ref != key]
    if len(others) == len(hooks):
        return False
    if others:
        options["hooks"] = group_hooks(others)
    else:
        del options["hooks"]
    return True


def share_hook_groups(entries: Sequence[dict[str, Any]]) -> None:
    """Give entries with the same hooks the same group, by which the host decides what is one batch.

    Args:
        entries: Dictionaries of the entries of a run, changed in place.
    """
    groups: dict[frozenset, comfy.hooks.HookGroup] = {}
    for entry in entries:
        if hooks := getattr(entry.pop("hooks", None), "hooks", ()):
            # Hooks of one reference may have strengths of their own, by their keyframes.
            identity = frozenset((hook, id(hook.hook_keyframe)) for hook in hooks)
            entry["hooks"] = groups.setdefault(identity, group_hooks(hooks))


def group_hooks(hooks: Sequence[comfy.hooks.Hook]) -> comfy.hooks.HookGroup:
    """Return hooks as one group of the host."""
    group = comfy.hooks.HookGroup()
    for hook in hooks:
        group.add(hook)
    return group
