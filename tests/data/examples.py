"""Pairs of which the tests of data/ make shards."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from blip_qformer.data.pairs import Pair

COUNT, SHARDS = 40, 5


def make_pair(number: int) -> Pair:
    """A pair of two smooth images, each of a colour of its own."""
    ramp = np.linspace(0, 1, 24)[:, None, None]
    images = []
    for colour in np.random.default_rng(number).uniform(0, 255, (2, 3)):
        images.append(Image.fromarray(np.broadcast_to(ramp * colour, (24, 16, 3)).astype(np.uint8)))
    return Pair(f"{number:04d}", *images, f"word {number}", f"a café, {number}", {"style": "noto", "code": number})


def indexed(shards: Path, folder: Path, **changes) -> Path:
    """A folder of the same shards with an index, as prepare writes it."""
    counts = {}
    for shard in sorted(shards.glob("*.tar")):
        (folder / shard.name).symlink_to(shard)
        counts[shard.name] = COUNT // SHARDS
    (folder / "index.json").write_text(json.dumps({"complete": True, "shards": counts} | changes))
    return folder


def keys(pairs) -> list[str]:
    return [pair.key for pair in pairs]


def first(stream, count: int) -> list[Pair]:
    return list(itertools.islice(iter(stream), count))
