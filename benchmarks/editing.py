"""What editing attention costs the sampler, and what the same costs with explicit maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import compare
from benchmarks.memory import cost_in_own_process
from benchmarks.sampling import EDGE, STEPS
from benchmarks.table import Row
from blip_qformer.attention.injection import ConditioningRows, inject_self
from blip_qformer.attention.plan import StepPlan
from tests.host import Host

PAIRS = 3
SOURCE, SWAPPED, REFINED = "a cat on a wooden chair", "a dog on a wooden chair", "a big red dog on a wooden chair"

#: SD1.5's finest self-attention, heads of 40; on a CPU two of its eight heads, so that the maps fit into memory.
HEADS, HEAD_WIDTH = (8 if torch.cuda.is_available() else 2), 40
EDGES = (512, 768, 1024)  # of the image, in pixels
ATTENTION_HEAD = ("what", "seconds", "peak beside the inputs, GB")


def editing_rows(host: Host, loaded: SimpleNamespace) -> Iterator[Row]:
    """Time every kind of edit on the stock KSampler, as a ratio to the same graph without it.

    Args:
        host: The loaded host.
        loaded: MODEL and CLIP of SD1.5's size.
    """
    source, swapped, refined, negative = (
        host.run("CLIPTextEncode", clip=loaded.clip, text=text)[0] for text in (SOURCE, SWAPPED, REFINED, "ugly")
    )
    empty = {"samples": torch.zeros(1, 4, EDGE // 8, EDGE // 8)}
    two = {"samples": torch.zeros(2, 4, EDGE // 8, EDGE // 8), "batch_index": [0, 0]}

    def sample(positive: list, latent: dict) -> dict:
        return host.ddim(loaded.model, positive, negative, latent, STEPS, guidance=7.5, seed=0)

    def pair(edited: list, text: str, **inputs: Any) -> list:
        inputs = {"source": source, "edited": edited, "latent": empty, "edited_text": text, **inputs}
        return host.run("BLIPDiffusionPromptToPrompt", clip=loaded.clip, source_text=SOURCE, **inputs)[0]

    reweighted, _ = host.run(
        "BLIPDiffusionAttentionReweight", conditioning=source, weights="cat:2, chair:0.5", clip=loaded.clip, text=SOURCE
    )
    where = f"{STEPS} steps, {EDGE}x{EDGE}"
    yield Row(
        f"Attention Re-weight Edit, {where}",
        "the same graph without it",
        compare(lambda: sample(reweighted, empty), lambda: sample(source, empty), PAIRS),
        "at most 1.02",
    )
    plain_swapped, plain_refined = ([[torch.cat([source[0][0], each[0][0]]), {}]] for each in (swapped, refined))
    for what, positive, plain, aim in (
        ("swap and self-injection", pair(swapped, SWAPPED), plain_swapped, "at most 1.05"),
        ("refine", pair(refined, REFINED), plain_refined, "at most 1.15"),
        ("refine with local blend", pair(refined, REFINED, blend_words="dog"), plain_refined, "at most 1.2"),
    ):
        yield Row(
            f"Prompt-to-Prompt Edit, {what}, {where}",
            "a plain batch of two",
            compare(lambda each=positive: sample(each, two), lambda each=plain: sample(each, two), PAIRS),
            aim,
        )


def attention_rows() -> Iterator[Row]:
    """Time self-attention with injected maps: fused, as a ratio to explicit."""
    for edge in EDGES:
        yield Row(
            f"self-attention taken over from another picture, {edge}x{edge}",
            "the same with explicit maps",
            compare(attention_work("fused", edge), attention_work("explicit", edge), PAIRS),
            "at most 0.67",
        )


def attention_costs() -> Iterator[tuple[str, ...]]:
    """Measure time and peak memory of both, each in a process of its own."""
    for edge in EDGES:
        for way in ("fused", "explicit"):
            cost = cost_in_own_process("edit attention", way, str(edge))
            yield f"{way}, {edge}x{edge}", f"{cost.seconds:.2f}", f"{cost.anonymous / 1e9:.2f}"


def attention_work(way: str, edge: int) -> Callable[[], Tensor]:
    """Return a self-attention layer for [source, edited], in which the edited image attends as its source does.

    Args:
        way: "fused", as the pack does it, or "explicit", with the maps in memory.
        edge: Height and width of the image in pixels.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, values = torch.randn(3, 2, (edge // 8) ** 2, HEADS * HEAD_WIDTH, device=device)
    planned = [(ConditioningRows(0, 2, 2), StepPlan(injects_self=True))]

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)

    def fused() -> Tensor:
        injected_query, injected_key = (split(inject_self(each, planned)) for each in (query, key))
        return F.scaled_dot_product_attention(injected_query, injected_key, split(values))

    def explicit() -> Tensor:
        maps = (split(query) @ split(key).transpose(-1, -2) * HEAD_WIDTH**-0.5).softmax(dim=-1)
        maps[1] = maps[0]
        return maps @ split(values)

    return {"fused": fused, "explicit": explicit}[way]
