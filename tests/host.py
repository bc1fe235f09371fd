"""The real ComfyUI inside the test process: its nodes as plain calls, the pack loaded by the host's own loader.

Everything runs in float32, so that a comparison with the reference implementation measures the code and not rounding.
The host keeps its state in modules, hence one host a process.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import io
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tools.host import PACK_NAME, comfyui_path, make_base_directory
from tools.host_versions import no_hidden_inputs
from tools.workflow import widgets_of


class InputList(list):
    """What a node with a list output gives: several runs of the next node, or one of a node that takes lists."""


@dataclass(frozen=True)
class Host:
    """A loaded ComfyUI.

    Attributes:
        base: Its base directory, with ``models``, ``input`` and ``output``.
        nodes: Node id -> class, stock nodes and the pack's.
        load_log: What was logged while the pack was loaded, a line a message, each with its level in front.
        pack: The pack's module, under the name the host gave it.
    """

    base: Path
    nodes: dict[str, type]
    load_log: str
    pack: ModuleType

    def run(self, node_id: str, **inputs: Any) -> tuple[Any, ...]:
        """Validate and execute one node as the host does, and return its outputs.

        Args:
            node_id: Its id, such as ``"KSampler"``.
            inputs: What its sockets and widgets hold; a widget left out has its default, as on a fresh node.

        Raises:
            ValueError: The node's own validation refused the inputs; its text is the message.
        """
        node = self.nodes[node_id]
        widgets = {widget.name: widget.default for widget in widgets_of({"input": node.INPUT_TYPES()}) if widget.name}
        inputs = {**widgets, **inputs}
        _validate(node, inputs, set(widgets))
        with torch.inference_mode():
            outputs = asyncio.run(_execute(node, inputs))
        is_list = getattr(node, "OUTPUT_IS_LIST", None) or [False] * len(outputs)
        return tuple(values if many else values[0] for values, many in zip(outputs, is_list, strict=True))

    def ddim(
        self, model: Any, positive: list, negative: list, latent: dict, steps: int, guidance: float, seed: int
    ) -> dict[str, torch.Tensor]:
        """The stock KSampler's DDIM run, whose timesteps ``tests.oracle.ddim`` visits too; returns the LATENT."""
        return self.run(
            "KSampler",
            model=model,
            seed=seed,
            steps=steps,
            cfg=guidance,
            sampler_name="ddim",
            scheduler="ddim_uniform",
            positive=positive,
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )[0]

    def module(self, name: str) -> ModuleType:
        """A module of the loaded pack, such as ``"nodes.encode"``; not a second copy of it."""
        return importlib.import_module(f"{self.pack.__name__}.{name}")


def load_host(base: Path) -> Host:
    """Import ComfyUI with its stock nodes, then the pack, and return both.

    Args:
        base: A folder for models, inputs and outputs; it is filled as far as it is empty.
    """
    base = make_base_directory(base)
    _set_options(base)
    nodes = _import_host_nodes()
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    folder = base / "custom_nodes" / PACK_NAME
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        loaded = asyncio.run(nodes.load_custom_node(str(folder)))
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
    if not loaded:
        raise ImportError(f"ComfyUI could not load the pack; it says:\n{log.getvalue()}")
    pack = sys.modules[str(folder).replace(".", "_x_")]  # the loader's own way to make a name of a path
    return Host(base, nodes.NODE_CLASS_MAPPINGS, log.getvalue(), pack)


def _set_options(base: Path) -> None:
    """Do what the command line does; the host reads these while it is imported, so this comes first."""
    path = str(comfyui_path())
    if path not in sys.path:
        sys.path.insert(0, path)
    options = importlib.import_module("comfy.cli_args").args
    options.base_directory = str(base)
    options.cpu = not torch.cuda.is_available()
    options.force_fp32 = options.fp32_text_enc = options.fp32_vae = True


def _import_host_nodes() -> ModuleType:
    """The host's ``nodes`` module; ours has the same name, and whoever got it instead learns so here."""
    importlib.import_module("utils.extra_config")  # as main.py: later, comfy's own utils would be found under the name
    nodes = importlib.import_module("nodes")
    if Path(str(nodes.__file__)).parent != comfyui_path():
        raise ImportError(f"'nodes' is {nodes.__file__}, not ComfyUI's: keep the repository's root off sys.path.")
    return nodes


def _validate(node: type, inputs: dict[str, Any], widgets: set[str]) -> None:
    """Ask the node what it thinks of its widgets; what comes over a link is not known yet and shown as None."""
    from comfy_api.internal import _ComfyNodeInternal, first_real_override

    if issubclass(node, _ComfyNodeInternal):
        validate = first_real_override(node, "validate_inputs")
    else:
        validate = getattr(node, "VALIDATE_INPUTS", None)
    if validate is None:
        return
    signature = inspect.getfullargspec(validate)
    known = {name: value if name in widgets else None for name, value in inputs.items()}
    if getattr(node, "INPUT_IS_LIST", False):
        known = {name: [value] for name, value in known.items()}
    verdict = validate(**{name: value for name, value in known.items() if signature.varkw or name in signature.args})
    if verdict is not True:
        raise ValueError(verdict)


async def _execute(node: type, inputs: dict[str, Any]) -> list[list[Any]]:
    """One list an output, as the host keeps them."""
    import execution

    lists = {name: value if isinstance(value, InputList) else [value] for name, value in inputs.items()}
    outputs, _, expands, is_pending = await execution.get_output_data(
        "test", "1", node(), lists, **no_hidden_inputs(execution.get_output_data)
    )
    if expands or is_pending:
        raise NotImplementedError(f"{node.__name__} needs the host's scheduler: queue it on the server instead.")
    return outputs
