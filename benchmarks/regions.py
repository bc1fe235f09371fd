"""What several subjects in one picture cost the sampler: Subject Regions, one subject, and the stock mask graph."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from benchmarks.measuring import compare
from benchmarks.sampling import EDGE, STEPS
from benchmarks.table import Row
from tests.host import Host

PAIRS = 3
SCENE, THING = "a wooden table in a garden", "a cup on a wooden table"

#: At most this part of one subject's time, and of the stock graph's with as many prompts, by the number of regions.
AIMS = {2: (1.03, 0.6), 3: (1.06, 0.45), 4: (1.10, 0.36)}


def region_rows(host: Host, loaded: SimpleNamespace) -> Iterator[Row]:
    """Time sampling with two to four regions beside each other.

    Args:
        host: The loaded host.
        loaded: MODEL and CLIP of SD1.5's size.
    """
    scene, thing, negative = (
        host.run("CLIPTextEncode", clip=loaded.clip, text=text)[0] for text in (SCENE, THING, "ugly")
    )
    empty = {"samples": torch.zeros(1, 4, EDGE // 8, EDGE // 8)}

    def sample(positive: list) -> dict:
        return host.ddim(loaded.model, positive, negative, empty, STEPS, guidance=7.5, seed=0)

    for count, (of_one, of_masks) in AIMS.items():
        ours, peer = regions(host, scene, thing, count), masks(host, scene, thing, count)
        what = f"Subject Regions, {count} subjects, {STEPS} steps, {EDGE}x{EDGE}"
        one = compare(lambda each=ours: sample(each), lambda: sample(thing), PAIRS)
        yield Row(what, "one subject", one, f"at most {of_one:.2f}")
        stock = compare(lambda each=ours: sample(each), lambda each=peer: sample(each), PAIRS)
        yield Row(what, "Conditioning (Set Mask) and Combine, as many prompts", stock, f"at most {of_masks:.2f}")


def regions(host: Host, scene: list, thing: list, count: int) -> list:
    """Return a conditioning with as many regions, side by side, with the node's own settings."""
    boxes = "\n".join(f"{number / count}, 0, {1 / count}, 1" for number in range(count))
    prompts = {f"region_{number}": thing for number in range(1, count + 1)}
    settings = {"strengths": "1", "feathers": "0.1", "base_share": 0.2, "start": 0.0, "end": 1.0}
    return host.run("BLIPDiffusionSubjectRegions", scene=scene, boxes=boxes, **prompts, **settings)[0]


def masks(host: Host, scene: list, thing: list, count: int) -> list:
    """Return the stock graph for the same: a scene, and a masked prompt for each subject."""
    combined = scene
    for number in range(count):
        mask = torch.zeros(1, EDGE, EDGE)
        mask[..., number * EDGE // count : (number + 1) * EDGE // count] = 1
        (masked,) = host.run(
            "ConditioningSetMask", conditioning=thing, mask=mask, strength=1.0, set_cond_area="default"
        )
        (combined,) = host.run("ConditioningCombine", conditioning_1=combined, conditioning_2=masked)
    return combined
