"""Pictures of every size and kind become what the references would have made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.blip_diffusion.blip_image_processing import BlipImageProcessor
from PIL import Image
from skimage import data
from torchvision import transforms

from blip_qformer.encoder import preprocess
from blip_qformer.encoder.preprocessing import CLIP_MEAN, CLIP_STD

ONE_LEVEL = 1 / 255 / min(CLIP_STD)  # one 8-bit step after normalisation


def photograph(width: int = 512, height: int = 300) -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((width, height))


def as_batch(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).float()[None] / 255


def plain(pixel_values: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: [B, 3, S, S] in 0..1."""
    return pixel_values * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)


@pytest.mark.parametrize("size", [(512, 300), (300, 512), (90, 100), (1500, 1000), (224, 224), (225, 333)])
def test_crop_is_the_originals(size):
    original = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    image = photograph(*size)
    difference = (preprocess(as_batch(image)) - original(image)).abs()
    assert difference.max() <= ONE_LEVEL + 1e-5
    assert difference.mean() < 0.1 * ONE_LEVEL


@pytest.mark.parametrize("size", [(512, 300), (100, 90), (1500, 1000)])
def test_squash_is_diffusers(size):
    processor = BlipImageProcessor(size={"height": 224, "width": 224}, do_center_crop=False)
    image = photograph(*size)
    expected = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    difference = (preprocess(as_batch(image), mode="squash") - expected).abs()
    assert difference.max() <= ONE_LEVEL + 1e-5
    assert difference.mean() < 0.1 * ONE_LEVEL


def test_pad_keeps_everything_on_white():
    image = torch.zeros(1, 100, 400, 3)
    padded = plain(preprocess(image, mode="pad"))[0]
    assert torch.allclose(padded[:, :80], torch.ones(1), atol=1e-5)  # 224 x 56 in the middle of 224 x 224
    assert torch.allclose(padded[:, 84:140], torch.zeros(1), atol=1e-5)
    assert torch.allclose(padded[:, 144:], torch.ones(1), atol=1e-5)


def test_far_ends_of_a_strip_do_not_change_the_middle():
    strip = as_batch(photograph(4000, 200))
    middle = strip[:, :, 1900:2100]
    difference = plain(preprocess(strip)) - plain(preprocess(middle))
    assert difference[..., 8:-8].abs().mean() < 0.02
    assert preprocess(torch.rand(1, 8000, 1, 3)).shape == (1, 3, 224, 224)


def test_large_pictures_are_antialiased():
    checkerboard = (torch.arange(2000)[:, None] + torch.arange(2000)) % 2
    grey = plain(preprocess(checkerboard[None, :, :, None].expand(-1, -1, -1, 3).float()))
    assert (grey - 0.5).abs().max() < 0.02


def test_8000_pixels_and_one_pixel():
    assert preprocess(torch.rand(1, 8000, 6000, 3)).shape == (1, 3, 224, 224)
    one_pixel = plain(preprocess(torch.full((1, 1, 1, 3), 0.2)))
    assert torch.allclose(one_pixel, torch.tensor(0.2), atol=1 / 255)


def test_grey_becomes_colour():
    grey = torch.rand(2, 64, 48, 1)
    assert torch.equal(preprocess(grey), preprocess(grey.expand(-1, -1, -1, 3)))


def test_transparent_shows_the_background():
    colour = torch.rand(1, 64, 64, 3)
    half = torch.cat([colour, torch.full((1, 64, 64, 1), 0.5)], dim=-1)
    assert torch.allclose(preprocess(half), preprocess(colour * 0.5 + 0.5), atol=1e-5)


def test_mask_puts_the_subject_on_white_and_fills_the_square():
    image, mask = torch.zeros(1, 200, 300, 3), torch.zeros(1, 200, 300)
    image[:, 20:60, 200:240] = torch.tensor([1.0, 0, 0])  # a red square 40 x 40, far from the centre
    mask[:, 20:60, 200:240] = 1
    found = plain(preprocess(image, mask=mask))[0]
    red = (found[0] > 0.9) & (found[1] < 0.1)
    assert 0.75 < red.float().mean() < 0.9  # 40 of 44 pixels in both directions
    assert torch.allclose(found[:, 0, 0], torch.ones(3), atol=1e-5)


def test_mask_of_a_smaller_image_of_the_same_shape_is_scaled():
    image = torch.rand(2, 128, 256, 3)
    mask = torch.zeros(1, 32, 64)
    mask[:, 8:24, 16:48] = 1
    large = torch.nn.functional.interpolate(mask[:, None], (128, 256), mode="bilinear", antialias=True)[:, 0]
    assert torch.equal(preprocess(image, mask=mask), preprocess(image, mask=large))


@pytest.mark.parametrize(
    ("images", "arguments", "sentence"),
    [
        (torch.full((1, 9, 9, 3), float("nan")), {}, "NaN or infinite"),
        (torch.zeros(1, 9, 9, 2), {}, "1, 3 or 4 channels"),
        (torch.zeros(9, 9, 3), {}, r"shape \[9, 9, 3\]"),
        (torch.zeros(0, 9, 9, 3), {}, r"shape \[0, 9, 9, 3\]"),
        (torch.zeros(1, 9, 9, 3), {"mode": "stretch"}, '"stretch".*crop, squash, pad'),
        (torch.zeros(1, 90, 90, 3), {"mask": torch.ones(1, 90, 45)}, "45 x 90 pixels and the picture 90 x 90"),
        (torch.zeros(3, 9, 9, 3), {"mask": torch.ones(2, 9, 9)}, r"3 picture\(s\) but the mask"),
        (torch.zeros(1, 9, 9, 3), {"mask": torch.zeros(1, 9, 9)}, "marks no subject"),
    ],
)
def test_pictures_that_cannot_be_read(images, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        preprocess(images, **arguments)
