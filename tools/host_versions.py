"""Differences between versions of ComfyUI that tests and tools meet; what the nodes meet is in nodes/host/versions.py.

Each difference says in which version it came. It is found by looking at the host, not at its number: hosts are also
taken from between two versions.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Stock nodes that not every version has, and the version in which they came.
NEWER_NODES = {
    "CFGOverride": "0.24.0",
    "DualModelGuider": "0.24.0",
    "MultiGPU_WorkUnits": "0.23.0",
    "NAGuidance": "0.14.0",
    "SamplerSEEDS2": "0.5.0",
    "SelectModelDevice": "0.23.0",
}

#: The same of samplers; KSampler takes euler for a name that it does not know.
NEWER_SAMPLERS = {"exp_heun_2_x0": "0.5.0", "exp_heun_2_x0_sde": "0.5.0"}


def read_version(comfyui: Path) -> str:
    """Return the version of a ComfyUI.

    Args:
        comfyui: Its folder.

    Raises:
        ValueError: There is no version in it.
    """
    file = comfyui / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    if found is None:
        raise ValueError(f"'{file}' names no version: give the folder of a ComfyUI, the one with main.py.")
    return found[1]


def no_hidden_inputs(get_output_data: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments that call ``execution.get_output_data`` for a node without hidden inputs.

    Args:
        get_output_data: The host's function.
    """
    return with_hidden_inputs(get_output_data, {})


def with_hidden_inputs(get_output_data: Callable[..., Any], hidden: dict[Any, Any]) -> dict[str, Any]:
    """Return the arguments that call ``execution.get_output_data`` for a node with hidden inputs.

    Up to 0.3.76 it takes ``hidden_inputs``; from 0.4.0 on they are an entry of ``v3_data``, beside what autogrowing and
    dynamic inputs need.

    Args:
        get_output_data: The host's function.
        hidden: Values by the host's ``Hidden``.
    """
    if "v3_data" in inspect.signature(get_output_data).parameters:
        return {"v3_data": {"hidden_inputs": hidden}}
    return {"hidden_inputs": hidden}


def has_dynamic_memory() -> bool:
    """Return whether the host has models with dynamic memory, as it does since 0.12.0.

    To be called where the host can be imported.
    """
    return hasattr(importlib.import_module("comfy.model_patcher"), "ModelPatcherDynamic")


def copies_dynamic_models() -> bool:
    """Return whether the host copies a MODEL with dynamic memory for a run with hooks, as it does since 0.16.0.

    To be called where the host can be imported.
    """
    patcher = importlib.import_module("comfy.model_patcher")
    return hasattr(getattr(patcher, "ModelPatcherDynamic", None), "get_non_dynamic_delegate")


def read_template(name: str) -> dict[str, Any] | None:
    """Return a workflow that ComfyUI ships as a template; None where this version has it no more.

    The packages that hold them are others in nearly every version, and 0.33.0 has no ``default``, ``lora`` and
    ``hiresfix_latent_workflow`` any more.

    Args:
        name: Name of the template.
    """
    templates = importlib.import_module("comfyui_workflow_templates")
    try:
        path = templates.get_asset_path(name, f"{name}.json")
    except (KeyError, FileNotFoundError):
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))


def what_is_not_read(graph: dict[str, Any], object_info: dict[str, Any]) -> str:
    """Say what in a template :func:`tools.workflow.to_prompt` does not read; empty where it reads all of it.

    Newer templates have subgraphs, and since 0.4.0 a node may have widgets that depend on the value of another.

    Args:
        graph: The template.
        object_info: Definitions of the server's nodes.
    """
    if graph.get("definitions", {}).get("subgraphs"):
        return "it has a subgraph"
    for node in graph["nodes"]:
        groups = object_info.get(node["type"], {}).get("input", {})
        specifications = [each for group in ("required", "optional") for each in groups.get(group, {}).values()]
        if any(specification[0] == "COMFY_DYNAMICCOMBO_V3" for specification in specifications):
            return f"widgets of {node['type']} depend on the value of another"
    return ""


def trained_lora(outputs: Sequence[Any]) -> dict[str, Any]:
    """Return the weights among the outputs of the stock Train LoRA.

    Up to 0.10.0 the patched MODEL comes first; from 0.11.0 on the node does not give it.

    Args:
        outputs: All outputs of the node.
    """
    return next(output for output in outputs if isinstance(output, dict))
