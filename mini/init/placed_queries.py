"""Initial attention of a Q-Former that is trained from nothing: each query attends to a region of its own.

    python -m mini place-queries MODEL PAIRS DST

From random weights every query attends to all of an image alike, and thousands of steps pass before one attends to
anything in particular; until then the vectors tell mean colours only. Here the keys of some heads begin as a linear
layer that reads a patch's row and column from its token, and the queries ask for those of a patch of their own. The
image encoder must be trained, so that its tokens do hold their positions (see :mod:`mini.stages.vision`). Nothing is
frozen: training goes on from there.
"""

from __future__ import annotations

import math
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
from blip_qformer.pipeline import load_pipeline, save_pipeline
from blip_qformer.training.stages.subject_vectors import qformer_output

IMAGES = 256  # enough to fit 16 linear functions of 128 numbers
FOCUS = 0.35  # of the fitted logits: low enough that a query also attends to its patch's neighbours, and can learn to
RIDGE = 1e-4  # of the queries' fit
WEIGHT_DECAY = 1e-4  # of the locations' fit
REMAINING = 0.3  # of the initial weights in the rest of a fitted head
SEED = 0


@torch.no_grad()
def initialise_queries(encoder: SubjectEncoder, pixel_values: Tensor, words: Sequence[str]) -> None:
    """Let each query begin by attending to the patches of its cell, in place.

    The cells are a square grid over the image, one for each query. Each patch of a cell has a head of its own, counted
    from the first head of the first layer with cross-attention.

    Args:
        encoder: The subject encoder, its image encoder trained.
        pixel_values: Preprocessed images of shape [B, 3, S, S], such as the encoder was trained on.
        words: A word for each image.

    Raises:
        ValueError: The grid does not divide the patches evenly, or there are too few heads, or too narrow ones.
    """
    edge = math.isqrt(encoder.config.vision.tokens - 1)
    attentions = [layer.cross_attention for layer in encoder.qformer.layers]
    layers = [attention for attention in attentions if isinstance(attention, QFormerAttention)]
    patches_of_layers = _assign_patches(encoder, edge, layers)
    tokens = encoder.vision(pixel_values)[:, 1:]  # [B, edge^2, image width]
    keys = fit_location(tokens, edge)
    for attention, patches in zip(layers, patches_of_layers, strict=False):  # later layers keep their weights
        queries = _attention_inputs(attention, encoder, pixel_values, words)  # [B, Q, width]
        for head, (down, right) in enumerate(patches):
            rows, columns = _patches_of_queries(encoder.config.qformer.query_tokens, edge, down, right)
            targets = torch.cat([F.one_hot(rows, edge), F.one_hot(columns, edge)], dim=1).float()  # [Q, 2 * edge]
            _initialise_head(attention, head, queries, targets, keys)
        for linear in (attention.value, attention.output):  # so that a patch's token reaches the query whole
            nn.init.orthogonal_(linear.weight)


def fit_location(tokens: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """Fit the linear layer that reads a token's row and column: softmax regression by L-BFGS.

    Args:
        tokens: Image tokens without the class token, of shape [B, edge^2, width].
        edge: Number of patches along the image's edge.

    Returns:
        Weight of shape [2 * edge, width] and bias of shape [2 * edge]: logits of the rows, then of the columns, each
        zero on average.
    """
    head = nn.Linear(tokens.shape[-1], 2 * edge).to(tokens.device)
    nn.init.zeros_(head.weight)
    rows_and_columns = torch.cartesian_prod(*[torch.arange(edge, device=tokens.device)] * 2).repeat(len(tokens), 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = rearrange(head(tokens.flatten(0, 1)), "n (two edge) -> (n two) edge", two=2)
        loss = F.cross_entropy(logits, rows_and_columns.flatten()) + WEIGHT_DECAY * head.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight, bias = (
        rearrange(each.detach(), "(two edge) ... -> two edge ...", two=2) for each in (head.weight, head.bias)
    )
    return (weight - weight.mean(1, keepdim=True)).flatten(0, 1), (bias - bias.mean(1, keepdim=True)).flatten()


def initialise_saved_model(source: Path, pairs: str, target: Path) -> None:
    """Write a copy of a model with initialised queries, fitted to the first pairs of a stream.

    Args:
        source: The model's folder.
        pairs: The pairs, see :class:`~blip_qformer.data.stream.PairStream`.
        target: The folder to write.

    Raises:
        ValueError: The model or the pairs cannot be read, or the sizes do not fit each other.
        OSError: The folder cannot be written to.
    """
    pipeline = load_pipeline(source)
    size = pipeline.encoder.config.vision.image_size
    batch = subject_batch(list(islice(PairStream(pairs), IMAGES)), size=size, resolution=size)
    pipeline.encoder.eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        initialise_queries(pipeline.encoder, batch["pixel_values"], batch["words"])
    save_pipeline(pipeline, target)


def _assign_patches(
    encoder: SubjectEncoder, edge: int, layers: Sequence[QFormerAttention]
) -> list[list[tuple[int, int]]]:
    """Assign the patches of a cell, as (row, column), to the first heads of each layer until all have one.

    Raises:
        ValueError: The sizes do not fit each other.
    """
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
    patches = [divmod(index, cell) for index in range(cell**2)]
    return [patches[start : start + heads] for start in range(0, len(patches), heads)]


def _patches_of_queries(queries: int, edge: int, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Return row [Q] and column [Q] of the patch that lies at (down, right) in each query's cell."""
    side = math.isqrt(queries)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)) * (edge // side)
    return cells[:, 0] + down, cells[:, 1] + right


def _attention_inputs(
    attention: QFormerAttention, encoder: SubjectEncoder, pixel_values: Tensor, words: Sequence[str]
) -> Tensor:
    """Record the queries [B, Q, width] that a layer's cross-attention receives."""
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        qformer_output(encoder, pixel_values, words)
    finally:
        hook.remove()
    return inputs[0]


def _initialise_head(
    attention: QFormerAttention, head: int, queries: Tensor, targets: Tensor, keys: tuple[Tensor, Tensor]
) -> None:
    """Let one head's keys hold rows and columns, and fit its queries to those that they should attend to.

    Args:
        attention: The cross-attention, changed in place.
        head: Index of the head.
        queries: Inputs of the query layer, of shape [B, Q, width].
        targets: One-hot row and column for each query, of shape [Q, 2 * edge].
        keys: Weight and bias of the key layer, from :func:`fit_location`.
    """
    width = attention.query.out_features // attention.heads
    inputs = F.pad(queries, (0, 1), value=1.0).flatten(0, 1)  # [B * Q, width + 1], a one for the bias
    outputs = FOCUS * math.sqrt(width) * targets.repeat(len(queries), 1)  # [B * Q, 2 * edge]
    ridge = RIDGE * len(inputs) * torch.eye(inputs.shape[1])
    solution = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ outputs)  # [width + 1, 2 * edge]
    start, end = head * width, (head + 1) * width
    fitted, rest = slice(start, start + targets.shape[1]), slice(start + targets.shape[1], end)
    attention.query.weight[fitted], attention.query.bias[fitted] = solution[:-1].T, solution[-1]
    attention.key.weight[fitted], attention.key.bias[fitted] = keys
    attention.query.weight[rest] *= REMAINING
    attention.key.weight[rest] *= REMAINING
