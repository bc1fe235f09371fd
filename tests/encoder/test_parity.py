"""The subject encoder gives the reference's vectors, on the reference's weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from blip_qformer import load_subject_encoder
from blip_qformer.encoder import SubjectEncoder, SubjectEncoderConfig
from tests import oracle

SIZES = {
    "small": oracle.SMALL,
    "one layer each": dataclasses.replace(oracle.SMALL, vision_layers=1, qformer_layers=1),
    "deep and wide": oracle.Sizes(
        image_size=84, vision_width=192, vision_layers=6, vision_heads=6, width=96, qformer_layers=5, qformer_heads=3
    ),
}
WORDS = {1: [["dog"], ["big teddy bear"]], 3: [["dog", "big teddy bear", "teapot"], ["red tea pot"] * 3]}


@pytest.fixture(scope="module", params=SIZES, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """The reference and ours with the same weights, and the edge of their images."""
    folder = tmp_path_factory.mktemp("parity")
    sizes = SIZES[request.param]
    reference = oracle.qformer(sizes, folder / "bert")
    reference.save_pretrained(folder / "hub" / "qformer")
    return reference, load_subject_encoder(folder / "hub"), sizes.image_size


@pytest.mark.parametrize("batch", WORDS)
def test_vectors_are_the_references(pair, batch):
    reference, encoder, size = pair
    pixel_values = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
    for words in WORDS[batch]:
        expected = reference(image_input=pixel_values, text_input=words, return_dict=False)
        assert expected.std() > 0.1  # a comparison of zeros would prove nothing
        torch.testing.assert_close(encoder(pixel_values, words), expected, atol=1e-4, rtol=0)


def test_words_of_different_length_do_not_disturb_each_other(pair):
    _, encoder, size = pair
    pixel_values = torch.randn(3, 3, size, size)
    words = ["dog", "big red teddy bear", "umbrella"]
    together = encoder(pixel_values, words)
    one_by_one = torch.cat([encoder(image[None], [word]) for image, word in zip(pixel_values, words, strict=True)])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)


def test_picture_and_word_both_matter(pair):
    _, encoder, size = pair
    images = torch.randn(2, 3, size, size)
    dog = encoder(images, ["dog", "dog"])
    assert (dog[0] - dog[1]).abs().mean() > 1e-2
    assert (dog - encoder(images, ["cat", "cat"])).abs().mean() > 1e-2


def test_published_sizes_are_the_default():
    encoder = SubjectEncoder(device="meta")
    assert sum(weight.numel() for weight in encoder.parameters()) == pytest.approx(494e6, rel=0.01)
    assert encoder.config == SubjectEncoderConfig.from_dict(encoder.config.to_dict())


def test_wrong_shapes_are_named(pair):
    _, encoder, size = pair
    with pytest.raises(ValueError, match=r"\[1, 3, 10, 10\].*preprocess"):
        encoder(torch.zeros(1, 3, 10, 10), ["dog"])
    with pytest.raises(ValueError, match="2 pictures and 1 words"):
        encoder(torch.zeros(2, 3, size, size), ["dog"])
