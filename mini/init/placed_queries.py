"""Where the queries of a Q-Former that is trained from nothing first look: each at its own part of the picture.

    python -m mini.init.placed_queries MODEL PAIRS DST

From random weights every query looks at all of a picture alike, and thousands of steps go by until one looks anywhere;
until then the vectors tell mean colours. Here the keys of some heads begin as a linear layer that reads a patch's row
and column off its token, and the queries ask for those of a patch of their own. The image encoder has to be trained, so
that its tokens do tell (see :mod:`.stages.vision`); everything goes on learning from there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blip_qformer.data.collate import subject_batch
from blip_qformer.data.stream import PairStream
from blip_qformer.encoder import SubjectEncoder
from blip_qformer.encoder.qformer import QFormerAttention
from blip_qformer.pipeline.pipeline import load_pipeline, save_pipeline
from blip_qformer.training.stages.subject_vectors import qformer_output

PICTURES = 256  # enough to fit 16 linear functions of 128 numbers


FOCUS = 0.35  # of the fitted logits: so soft that a query also sees its patch's neighbours, and can learn to look there


RIDGE = 1e-4  # of the queries' fit


SEED = 0


REMAINING = 0.3  # of what is left of the first weights in a head that looks at a place


@torch.no_grad()
def place_queries(encoder: SubjectEncoder, pixel_values: Tensor, words: Sequence[str]) -> None:
    """Let each query begin by looking at the patches of its cell; in place.

    The queries share the picture out as a square of cells. Each patch of a cell is looked at by one head, the first
    head of the first layer with cross-attention being the first.

    Args:
        pixel_values: preprocessed pictures [B, 3, S, S], such as the encoder was trained on.
        words: what is asked about each.

    Raises:
        ValueError: the queries do not share out the patches evenly, or there are too few heads, or too narrow ones.
    """
    edge = math.isqrt(encoder.config.vision.tokens - 1)
    layers = [layer.cross_attention for layer in encoder.qformer.layers if layer.cross_attention is not None]
    looks = _looks(encoder, edge, layers)
    tokens = encoder.vision(pixel_values)[:, 1:]  # [B, edge^2, image width]
    keys = fit_location(tokens, edge)
    for attention, patches in zip(layers, looks, strict=False):  # the later layers look where they like
        queries = _queries_before(attention, encoder, pixel_values, words)  # [B, Q, width]
        for head, (down, right) in enumerate(patches):
            rows, columns = _patches_of_queries(encoder.config.qformer.query_tokens, edge, down, right)
            asked = torch.cat([F.one_hot(rows, edge), F.one_hot(columns, edge)], dim=1).float()  # [Q, 2 * edge]
            _turn_head(attention, head, queries, asked, keys)
        for linear in (attention.value, attention.output):  # what is seen arrives whole
            nn.init.orthogonal_(linear.weight)


def fit_location(tokens: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """The linear layer that tells a token's row and column: softmax regression, fitted by L-BFGS.

    Args:
        tokens: [B, edge^2, width]

    Returns:
        Weight [2 * edge, width] and bias [2 * edge]: logits of the rows, then of the columns, zero on average.
    """
    head = nn.Linear(tokens.shape[-1], 2 * edge).to(tokens.device)
    nn.init.zeros_(head.weight)
    rows_and_columns = torch.cartesian_prod(*[torch.arange(edge, device=tokens.device)] * 2).repeat(len(tokens), 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = rearrange(head(tokens.flatten(0, 1)), "n (two place) -> (n two) place", two=2)
        error = F.cross_entropy(logits, rows_and_columns.flatten()) + 1e-4 * head.weight.square().sum()
        error.backward()
        return error

    with torch.enable_grad():
        optimizer.step(loss)
    weight, bias = (
        rearrange(each.detach(), "(two place) ... -> two place ...", two=2) for each in (head.weight, head.bias)
    )
    return (weight - weight.mean(1, keepdim=True)).flatten(0, 1), (bias - bias.mean(1, keepdim=True)).flatten()


def _looks(encoder: SubjectEncoder, edge: int, layers: Sequence[QFormerAttention]) -> list[list[tuple[int, int]]]:
    """The patches of a cell, as (row, column), that the first heads of each layer look at, till all have been."""
    config = encoder.config.qformer
    side = math.isqrt(config.query_tokens)
    if side**2 != config.query_tokens or edge % side:
        raise ValueError(
            f"{config.query_tokens} queries cannot share out {edge} x {edge} patches: choose a square number of them "
            f"whose root divides {edge}."
        )
    cell, heads = edge // side, config.heads
    if cell**2 > len(layers) * heads or 2 * edge > config.width // heads:
        raise ValueError(
            f"{len(layers) * heads} heads, each {config.width // heads} wide, cannot look at {cell**2} patches of a "
            f"cell by rows and columns of {edge}: choose fewer patches, or more and wider heads."
        )
    patches = [divmod(number, cell) for number in range(cell**2)]
    return [patches[first : first + heads] for first in range(0, len(patches), heads)]


def _patches_of_queries(queries: int, edge: int, down: int, right: int) -> tuple[Tensor, Tensor]:
    """The row and the column [Q] of the patch that each query looks at."""
    side = math.isqrt(queries)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)) * (edge // side)
    return cells[:, 0] + down, cells[:, 1] + right


def _queries_before(
    attention: QFormerAttention, encoder: SubjectEncoder, pixel_values: Tensor, words: Sequence[str]
) -> Tensor:
    """What comes into a layer's cross-attention [B, Q, width]."""
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        qformer_output(encoder, pixel_values, words)
    finally:
        hook.remove()
    return seen[0]


def _turn_head(
    attention: QFormerAttention, head: int, queries: Tensor, asked: Tensor, keys: tuple[Tensor, Tensor]
) -> None:
    """Let one head's keys tell rows and columns, and its queries [B, Q, width] ask for those in ``asked``."""
    width = attention.query.out_features // attention.heads
    inputs = F.pad(queries, (0, 1), value=1.0).flatten(0, 1)  # [B * Q, width + 1], a one for the bias
    wanted = FOCUS * math.sqrt(width) * asked.repeat(len(queries), 1)  # [B * Q, 2 * edge]
    ridge = RIDGE * len(inputs) * torch.eye(inputs.shape[1])
    fitted = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted)  # [width + 1, 2 * edge]
    start, end = head * width, (head + 1) * width
    place, rest = slice(start, start + asked.shape[1]), slice(start + asked.shape[1], end)
    attention.query.weight[place], attention.query.bias[place] = fitted[:-1].T, fitted[-1]
    attention.key.weight[place], attention.key.bias[place] = keys
    attention.query.weight[rest] *= REMAINING
    attention.key.weight[rest] *= REMAINING


def place_model(model: Path, pairs: str, target: Path) -> None:
    """Write a model whose queries look at their places, fitted to the first of a source's pairs.

    Raises:
        ValueError: the model or the pairs cannot be read, or the sizes do not fit each other.
        OSError: the folder cannot be written to.
    """
    pipeline = load_pipeline(model)
    size = pipeline.encoder.config.vision.image_size
    batch = subject_batch(list(islice(PairStream(pairs), PICTURES)), size=size, resolution=size)
    pipeline.encoder.eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        place_queries(pipeline.encoder, batch["pixel_values"], batch["words"])
    save_pipeline(pipeline, target)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m mini.init.placed_queries", description=__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model's folder, its image encoder trained")
    parser.add_argument("pairs", metavar="PAIRS", help="folder of shards, or their names")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        place_model(arguments.model, arguments.pairs, arguments.target)
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"The model whose queries look at their places is in {arguments.target}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
