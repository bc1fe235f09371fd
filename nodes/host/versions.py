"""Differences between versions of ComfyUI that the nodes meet; what tests and tools meet is in tools/host_versions.py.

Each difference says in which version it came. It is found by looking at the host, not at its number: hosts are also
taken from between two versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from comfy_api.v0_0_2 import io

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
