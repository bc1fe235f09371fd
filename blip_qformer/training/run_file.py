"""Read a run's YAML as plain values, whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..extras import import_extra
from ..limits import MAX_RUN_FILE_BYTES, MAX_YAML_VALUES
from ..plain_data import read_bytes

EXAMPLES = "see blip_qformer/training/runs/ for examples"


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file whose content is a mapping of names to values.

    Args:
        file: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML, or not such a mapping, or its aliases stand for too many values.
    """
    yaml = import_extra("yaml", "Reading a run's file")
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}: {EXAMPLES}.")
    content = read_bytes(file, MAX_RUN_FILE_BYTES)
    try:
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
        count = 0 if node is None else _count_values(node, {})
        values = None if node is None or count > MAX_YAML_VALUES else loader.construct_document(node)
    except Exception as error:  # beside its own, PyYAML raises what int(), date() and tables of names raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is no YAML ({reason[:200]}): {EXAMPLES}.") from error
    if count > MAX_YAML_VALUES:
        raise ValueError(
            f"{file} stands for more than {MAX_YAML_VALUES} values, as its aliases (*) repeat what they name: write "
            f"the values out; {EXAMPLES}."
        )
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no mapping of names to values: {EXAMPLES}.")
    return values


def _count_values(node: Any, known: dict[int, int]) -> int:
    """Count the values that a node of YAML stands for, each alias as often as it stands there.

    Args:
        node: A node of PyYAML's tree, in which an alias is the same object as what it names.
        known: Counts of nodes by their ids, filled on the way.

    Raises:
        ValueError: A node holds itself.
    """
    if id(node) not in known:
        known[id(node)] = -1
        children = node.value if isinstance(node.value, list) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    if known[id(node)] < 0:
        raise ValueError("a value holds itself")
    return known[id(node)]
