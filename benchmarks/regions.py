"""What several subjects in one picture cost the sampler: Subject Regions, one subject, and the stock mask graph.

``python -m benchmarks.regions [--write]`` keeps to eight minutes on two cores. A step is one call of the guider with
positive and negative prompts. At 512 pixels the U-Net has SD1.5's own width; at 768 a narrower one, or a single round
would take longer than that. In a narrow one, what regions cost weighs more against the rest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Comparison
from benchmarks.memory import Cost, measure
from benchmarks.table import HEAD, RESULTS, Row, machine, markdown_table, write_section
from tests import oracle
from tests.host import Host, load_host

COMMAND = "python -m benchmarks.regions"

#: At most this part of one subject's time, and of the stock graph's with as many prompts, by the number of regions.
AIMS = {2: (1.03, 0.6), 3: (1.06, 0.45), 4: (1.10, 0.36)}

#: The U-Net's first width (SD1.5's is 320) and the seconds of measurement, by the edge of the picture in pixels.
PLANS = {512: (320, 220), 768: (128, 160)}
TOKENS, CONTEXT_WIDTH = 77, 768
MEMORY_HEAD = ("what", "one subject, GB", "2 regions, GB", "3 regions, GB", "4 regions, GB", "stock with 4, GB")

ONE = "one subject"
Costs = dict[str, list[Cost]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or keep the tables."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Speed and memory of several subjects, as ratios.")
    parser.add_argument("--edges", type=int, nargs="+", default=[*PLANS], help="sizes of the pictures (512 768)")
    parser.add_argument("--width", type=int, help="the U-Net's first width (320 at 512 pixels, else 128)")
    parser.add_argument("--seconds", type=int, help="of each size; one round is always finished (220 and 160)")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {RESULTS.name}")
    chosen = parser.parse_args(arguments)
    rows, memory = [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        host = load_host(Path(folder) / "host")
        for edge in chosen.edges:
            width, seconds = PLANS.get(edge, (128, 160))
            costs = _costs(host, edge, chosen.width or width, chosen.seconds or seconds)
            what = f"one step, {edge}x{edge}, U-Net of width {chosen.width or width}"
            for row in _rows(costs, what):
                rows.append(row.cells())
                print(" | ".join(rows[-1]), flush=True)
            memory.append((what, *_peaks(costs)))
    text = (
        f"{machine()}. Random weights, float32, cfg 7.5, prompts of {TOKENS} tokens; the U-Net's levels are 1, 2, 4 "
        "and 4 times as wide as the first, of which SD1.5's is 320. All ways ran in turns, in rounds whose order "
        "rotates; a ratio below 1 means ours is faster. The stock graph has a prompt for the scene, one for each "
        "subject with *Conditioning (Set Mask)*, and the negative one; it is run as the host batches it.\n\n"
        f"{markdown_table(HEAD, rows)}\n\nPeak of RssAnon during a step, beside the weights:\n\n"
        f"{markdown_table(MEMORY_HEAD, memory)}"
    )
    print(f"\n{text}")
    if chosen.write:
        write_section(COMMAND, text)


def ways(host: Host, model: Any, edge: int) -> dict[str, tuple[Any, list]]:
    """Return the MODEL and the positive conditioning of every way.

    Args:
        host: The loaded host.
        model: The MODEL.
        edge: Edge of the picture in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    scene, *things = ([[torch.randn(1, TOKENS, CONTEXT_WIDTH, generator=generator), {}]] for _ in range(1 + max(AIMS)))
    found = {ONE: (model, things[0])}
    for count in AIMS:
        found[_ours(count)] = regions(host, model, scene, things[:count])
        found[_stock(count)] = model, masks(host, scene, things[:count], edge)
    return found


def regions(host: Host, model: Any, scene: list, things: Sequence[list]) -> tuple[Any, list]:
    """Return MODEL and conditioning with a region for each thing, side by side, with the node's own settings."""
    count = len(things)
    boxes = "\n".join(f"{number / count}, 0, {1 / count}, 1" for number in range(count))
    prompts = {f"region_{number}": thing for number, thing in enumerate(things, start=1)}
    inputs = {"model": model, "scene": scene, "boxes": boxes}
    conditioning, _, regional_model = host.run("BLIPDiffusionSubjectRegions", **inputs, **prompts)
    return regional_model, conditioning


def masks(host: Host, scene: list, things: Sequence[list], edge: int) -> list:
    """Return the stock graph for the same: a scene, and a masked prompt for each thing."""
    combined, count = scene, len(things)
    for number, thing in enumerate(things):
        mask = torch.zeros(1, edge, edge)
        mask[..., number * edge // count : (number + 1) * edge // count] = 1
        (masked,) = host.run(
            "ConditioningSetMask", conditioning=thing, mask=mask, strength=1.0, set_cond_area="default"
        )
        (combined,) = host.run("ConditioningCombine", conditioning_1=combined, conditioning_2=masked)
    return combined


def _costs(host: Host, edge: int, width: int, seconds: float) -> Costs:
    """Measure one step of each way, in rounds, for about as long."""
    model = _model(host, width)
    generator = torch.Generator().manual_seed(1)
    negative = [[torch.randn(1, TOKENS, CONTEXT_WIDTH, generator=generator), {}]]
    latent = {"samples": torch.zeros(1, 4, edge // 8, edge // 8)}
    settings = {"steps": 1, "cfg": 7.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 0}

    def step(own_model: Any, positive: list) -> Callable[[], Any]:
        inputs = {"model": own_model, "positive": positive, "negative": negative, "latent_image": latent}
        return lambda: host.run("KSampler", **inputs, **settings)

    steps = {name: step(*way) for name, way in ways(host, model, edge).items()}
    steps[_ours(max(AIMS))]()  # to warm up
    return measure_in_rounds(steps, seconds)


def measure_in_rounds(functions: Mapping[str, Callable[[], Any]], seconds: float) -> Costs:
    """Measure functions in turns: one round, and as many more as the time is expected to allow.

    Where the time is too short for another whole round, the slow ways are left out of it.

    Args:
        functions: Functions by their names.
        seconds: Time for all rounds.
    """
    costs: Costs = {name: [] for name in functions}
    start = time.perf_counter()
    chosen = [*functions]
    while chosen:
        for name in chosen:
            costs[name].append(measure(functions[name]))
        left = seconds - (time.perf_counter() - start)
        lengths = {name: each[0].seconds for name, each in costs.items()}
        quick = [name for name in chosen if not name.startswith("stock")]
        chosen = next((names for names in ([*chosen], quick) if sum(lengths[name] for name in names) <= left), [])
        chosen = chosen[1:] + chosen[:1]
    return costs


def _model(host: Host, width: int) -> Any:
    """A MODEL of SD1.5's build with random weights."""
    component, networks = host.module("blip_qformer.checkpoint").Component, host.module("nodes.host.networks")
    sizes = replace(oracle.FULL, unet_channels=(width, 2 * width, 4 * width, 4 * width), vae_channels=(32, 32, 32, 32))
    unet, vae = oracle.unet(sizes), oracle.vae(sizes)
    path = Path("random")
    unet_part, vae_part = (component(path, dict(each.config), each.state_dict) for each in (unet, vae))
    return networks.build_model(unet_part, vae_part)


def _rows(costs: Costs, what: str) -> Iterator[Row]:
    for count, (of_one, of_stock) in AIMS.items():
        name = f"{count} subjects, {what}"
        yield Row(name, ONE, _compared(costs, _ours(count), ONE), f"at most {of_one:.2f}")
        peer = "Conditioning (Set Mask) and Combine, as many prompts"
        yield Row(name, peer, _compared(costs, _ours(count), _stock(count)), f"at most {of_stock:.2f}")


def _compared(costs: Costs, ours: str, peer: str) -> Comparison:
    """The times of two ways in the rounds that have both."""
    pairs = list(zip(costs[ours], costs[peer], strict=False))
    return Comparison([one.seconds for one, _ in pairs], [other.seconds for _, other in pairs])


def _peaks(costs: Costs) -> list[str]:
    names = [ONE, *map(_ours, AIMS), _stock(max(AIMS))]
    return [f"{statistics.median(cost.anonymous for cost in costs[name]) / 1e9:.2f}" for name in names]


def _ours(count: int) -> str:
    return f"{count} regions"


def _stock(count: int) -> str:
    return f"stock with {count}"


if __name__ == "__main__":
    main()
