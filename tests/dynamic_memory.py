"""The host's own dynamic memory on a CPU, where it never turns it on by itself.

It is the real ``ModelPatcherDynamic``, and layers that have no weights until a file gives them some. What needs a card
is left out: weights that a layer fetches through comfy-aimdo (a layer uses them where they are), and buffers of pinned
memory.
"""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

from tools.host_versions import has_dynamic_memory


class PinnedBuffer:
    """A buffer of pinned memory without memory."""

    def __init__(self, *sizes: int) -> None:
        self.size = 0

    def truncate(self, offset: int, **options: Any) -> None:
        """Free nothing."""


def dynamic_patcher(counts: SimpleNamespace) -> type | None:
    """Make the class that stands in for ``CoreModelPatcher``; None if this version of the host has none.

    Args:
        counts: Gets the number of static copies that the host asked for, as ``delegates``.
    """
    if not has_dynamic_memory():
        return None
    host: ModuleType = importlib.import_module("comfy.model_patcher")
    counts.delegates = 0

    class DynamicOnCpu(host.ModelPatcherDynamic):
        def __new__(cls, *args: Any, **options: Any) -> DynamicOnCpu:
            return object.__new__(cls)  # the host's gives a CPU a plain patcher

        def load(self, device_to: Any = None, **options: Any) -> None:
            super().load(device_to, **options)
            for name in self.patches.keys() - self.backup.keys():  # the host has patched the smallest itself
                self.patch_weight_to_device(name, device_to)  # comfy-aimdo would do so with what it fetches

        def partially_unload(self, *args: Any, **options: Any) -> int:
            return self.restore_loaded_backups()

        def get_non_dynamic_delegate(self) -> Any:
            counts.delegates += 1
            return super().get_non_dynamic_delegate()

    return DynamicOnCpu


def turn_on(replace: Any, counts: SimpleNamespace) -> bool:
    """Make the host's next models with dynamic memory, and return whether this version of it can.

    Args:
        replace: Function that sets an attribute of a module, such as pytest's ``monkeypatch.setattr``.
        counts: See :func:`dynamic_patcher`.
    """
    patcher = dynamic_patcher(counts)
    if patcher is None:
        return False
    replace(importlib.import_module("comfy_aimdo.host_buffer"), "HostBuffer", PinnedBuffer)
    replace(importlib.import_module("comfy_aimdo.model_vbar"), "vbars_analyze", lambda device: 0)
    replace(importlib.import_module("comfy.model_patcher"), "CoreModelPatcher", patcher)
    replace(importlib.import_module("comfy.memory_management"), "aimdo_enabled", True)
    return True
