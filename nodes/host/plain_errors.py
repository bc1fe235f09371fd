"""What the page shows of an error: the host prints the module and name of its class above the sentence."""

from __future__ import annotations

from functools import wraps
from typing import Any

from comfy_api.v0_0_2 import io

PACK = __name__.removesuffix(".nodes.host.plain_errors")


def with_plain_errors(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Make a node raise ValueError instead of the library's subclasses of it, such as CheckpointError.

    The host calls a class that is not built in by its module, and the pack's module is its path on disk.

    Args:
        node: Node class, changed in place.

    Returns:
        The same class.
    """
    execute = node.execute.__func__

    @wraps(execute)
    def execute_plainly(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        try:
            return execute(cls, *args, **kwargs)
        except ValueError as error:
            if not type(error).__module__.startswith(f"{PACK}."):
                raise
            # With the traceback of the first, as the host reports only that of the last.
            raise ValueError(str(error)).with_traceback(error.__traceback__) from error

    setattr(node, "execute", classmethod(execute_plainly))  # noqa: B010 - no type fits a class method put on a class
    return node
