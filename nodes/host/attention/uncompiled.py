"""Sampling runs without torch.compile, for edits and records."""

from __future__ import annotations

import logging
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

log = logging.getLogger("blip_diffusion")


def run_uncompiled(model_options: dict[str, Any]) -> None:
    """Let a run call the U-Net itself where TorchCompileModel, or a node like it, has compiled it.

    What is compiled keeps the patches of its first call, and the state that they had then: the host has torch not
    compare ``transformer_options``. An edit of later steps would never act, nor one in a run behind one without it.

    Args:
        model_options: The guider's options, which are its own copy.
    """
    wrappers = model_options["transformer_options"].get("wrappers", {})
    applied = wrappers.get(WrappersMP.APPLY_MODEL, {})
    if COMPILE_KEY in applied:
        wrappers[WrappersMP.APPLY_MODEL] = {key: each for key, each in applied.items() if key != COMPILE_KEY}
        log.info("This run does without torch.compile, which would not notice that attention is edited or recorded.")
