"""Initial weights with which each query attends to its own region of an image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_qformer.encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from blip_qformer.pipeline.new import init_weights
from mini.init import placed_queries
from mini.init.patch_positions import initialise_patch_positions
from mini.init.placed_queries import fit_location, initialise_queries

WORDS = ["dog", "cat", "hat", "bowl"]


def new_encoder(queries: int = 4, heads: int = 2) -> SubjectEncoder:
    """4 x 4 patches, 2 x 2 queries, two layers with cross-attention."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, patch_size=8, width=32, layers=1, heads=2, feed_forward_width=64)
    qformer = QFormerConfig(width=48, layers=2, heads=heads, feed_forward_width=64, query_tokens=queries)
    encoder = SubjectEncoder(SubjectEncoderConfig(vision, qformer, 48)).requires_grad_(False)
    init_weights(encoder.vision, 32)
    init_weights(encoder.qformer, 48)
    initialise_patch_positions(encoder.vision.position_embedding)
    return encoder


@pytest.fixture
def images() -> Tensor:
    return F.interpolate(torch.randn(len(WORDS), 3, 4, 4, generator=torch.Generator().manual_seed(0)), (32, 32))


def attention_of(encoder: SubjectEncoder, images: Tensor, layer: int, head: int) -> Tensor:
    """How much each query attends to each patch [Q, 4, 4], for all images on average."""
    attention = encoder.qformer.layers[layer].cross_attention
    queries = placed_queries._attention_inputs(attention, encoder, images, WORDS)
    width = attention.query.out_features // attention.heads
    channels = slice(head * width, (head + 1) * width)
    query, key = attention.query(queries)[..., channels], attention.key(encoder.vision(images))[..., channels]
    attention_map = (query @ key.mT / width**0.5).softmax(dim=-1).mean(dim=0)  # [Q, 1 + N]
    return attention_map[:, 1:].unflatten(1, (4, 4))


def test_each_query_attends_to_the_patches_of_its_cell(images):
    encoder = new_encoder()
    initialise_queries(encoder, images, WORDS)
    for number, (layer, head) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        attention_map = attention_of(encoder, images, layer, head)
        down, right = divmod(number, 2)
        for query, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
            assert divmod(attention_map[query].argmax().item(), 4) == (row + down, column + right)
            assert attention_map[query].max() > 0.3  # of random weights 0.06


def test_the_vectors_tell_where_something_is(images):
    """What is seen of a corner reaches the query of that corner first, and most."""
    encoder = new_encoder()
    initialise_queries(encoder, images, WORDS)
    changed = images.clone()
    changed[..., 16:, 16:] = 2.0  # lower right
    layer = encoder.qformer.layers[0].cross_attention
    queries = placed_queries._attention_inputs(layer, encoder, images, WORDS)
    moved = (layer(queries, encoder.vision(changed)) - layer(queries, encoder.vision(images))).norm(dim=-1).mean(0)
    assert moved.argmax() == 3
    assert moved[3] > 2 * moved[0]


def test_rows_and_columns_are_read_off_tokens(images):
    encoder = new_encoder()
    weight, bias = fit_location(encoder.vision(images)[:, 1:], edge=4)
    logits = (encoder.vision(images)[:, 1:] @ weight.T + bias).unflatten(-1, (2, 4))  # [B, N, 2, 4]
    assert torch.equal(logits.argmax(dim=-1)[0], torch.cartesian_prod(torch.arange(4), torch.arange(4)))
    assert logits.mean(dim=-1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("queries", "heads", "sentence"),
    [
        (5, 2, "5 queries cannot share out 4 x 4 patches"),
        (9, 2, "9 queries cannot share out 4 x 4 patches"),
        (4, 1, "2 heads, each 48 wide, cannot look at 4 patches"),
        (4, 8, "16 heads, each 6 wide, cannot look at 4 patches"),
    ],
)
def test_sizes_that_do_not_fit_get_one_sentence(images, queries, heads, sentence):
    with pytest.raises(ValueError, match=sentence):
        initialise_queries(new_encoder(queries, heads), images, WORDS)
