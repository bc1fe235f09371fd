"""Subject on Background in the host: by masks, and by a small random CLIPSeg with pymatting."""

from __future__ import annotations

import sys

import pytest
import torch

from blip_qformer.imaging.segmentation import Segmenter
from tests.clipseg import write_clipseg


def random_images(count: int, height: int, width: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def square(
    height: int = 40, width: int = 60, rows: slice = slice(5, 20), columns: slice = slice(10, 30)
) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, rows, columns] = 1
    return mask


def put(host, image, background, **inputs):
    return host.run("BLIPDiffusionSubjectOnBackground", image=image, background=background, **inputs)


@pytest.fixture
def no_models(monkeypatch):
    """pymatting and transformers are not installed."""
    for name in ("pymatting", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_mask_needs_neither_model_nor_package(host, no_models):
    image, background = random_images(1, 40, 60), random_images(1, 40, 60, seed=1)
    mask = square()
    found, new_mask = put(host, image, background, mask=mask, segmentation_model="of another machine")
    assert torch.equal(new_mask, mask)
    assert torch.equal(found, torch.where(mask[..., None] == 1, image, background))


def test_a_mask_with_an_axis_for_its_channel_is_one_mask(host, no_models):
    image, background = random_images(1, 40, 60), random_images(1, 40, 60, seed=1)
    found, _ = put(host, image, background, mask=square()[:, None])
    assert torch.equal(found, put(host, image, background, mask=square())[0])


def test_a_grey_mask_is_half_transparent(host):
    image, background, mask = random_images(1, 40, 60), random_images(1, 40, 60, seed=1), 0.5 * square()
    found, _ = put(host, image, background, mask=mask)
    torch.testing.assert_close(found, image * mask[..., None] + background * (1 - mask[..., None]))


def test_place_and_scale(host):
    white, black = torch.ones(1, 40, 60, 3), torch.zeros(1, 40, 60, 3)
    _, new_mask = put(host, white, black, mask=square(), x=0.5, y=-0.25)
    assert torch.equal(new_mask, square(rows=slice(0, 10), columns=slice(40, 60)))
    found, new_mask = put(host, white, torch.zeros(1, 100, 120, 3), mask=square(), scale=0.5)
    expected = square(100, 120, slice(35, 50), slice(40, 60))  # as in an image of 80 x 120 at half the size
    assert torch.equal(new_mask, expected)
    assert torch.equal(found[..., 0], expected)


def test_the_size_is_the_backgrounds_or_the_pictures(host):
    image, background = random_images(1, 40, 60), random_images(1, 30, 90, seed=1)
    found, new_mask = put(host, image, background, mask=square())
    assert (found.shape, new_mask.shape) == ((1, 30, 90, 3), (1, 30, 90))
    found, new_mask = put(host, image, background, mask=square(), output_size="picture")
    assert torch.equal(new_mask, square())
    assert torch.equal(found[new_mask == 1], image[new_mask == 1])


def test_batches(host):
    image, background = random_images(3, 40, 60), random_images(3, 40, 60, seed=1)
    masks = torch.cat([square(), square(rows=slice(10, 30)), square(columns=slice(30, 50))])
    found, new_mask = put(host, image, background, mask=masks)
    assert torch.equal(found, torch.where(masks[..., None] == 1, image, background))
    found, new_mask = put(host, image, background[:1], mask=square())
    assert torch.equal(found, torch.where(square()[..., None] == 1, image, background[:1]))
    found, new_mask = put(host, image[:1], background, mask=square())
    assert torch.equal(found, torch.where(square()[..., None] == 1, image[:1], background))
    with pytest.raises(ValueError, match="There are 3 pictures and 2 backgrounds: give as many"):
        put(host, image, background[:2], mask=masks)


def test_a_mask_of_another_size_is_scaled(host):
    image, background = random_images(1, 40, 60), random_images(1, 40, 60, seed=1)
    _, new_mask = put(host, image, background, mask=square(80, 120, slice(10, 40), slice(20, 60)))
    torch.testing.assert_close(new_mask, square(), atol=0.5, rtol=0)
    assert torch.equal(new_mask.round(), square())


def test_a_soft_edge(host):
    image, background = random_images(1, 40, 60), random_images(1, 40, 60, seed=1)
    _, new_mask = put(host, image, background, mask=square(), soften_edge=2.0)
    assert new_mask[0, 12, 20] > 0.99
    assert new_mask[0, 12, 10] + new_mask[0, 12, 9] == pytest.approx(1, abs=1e-4)
    assert new_mask.sum() == pytest.approx(300, rel=1e-3)


def test_transparent_and_grey_pictures(host):
    found, _ = put(host, torch.zeros(1, 40, 60, 4), random_images(1, 40, 60, channels=1), mask=square())
    assert found.shape == (1, 40, 60, 3)
    assert (found[0, 5:20, 10:30] == 1).all()  # what is transparent is white, as in BLIP-2 Subject Encode


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.zeros(1, 40, 60), "The mask is black everywhere.* leave the mask unconnected"),
        (torch.cat([square(), torch.zeros(1, 40, 60)]), "The mask is black everywhere"),
        (1 - square(), "white all along the picture's border, so it marks the background: invert"),
        (torch.ones(1, 40, 60), "The mask is white everywhere.* leave the mask unconnected"),
        (square(40, 40), "The mask is 40 x 40 pixels and the picture 60 x 40"),
        (square().repeat(3, 1, 1), "holds 2 picture"),
    ],
)
def test_masks_that_cannot_be_used_get_one_sentence(host, mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        put(host, random_images(2, 40, 60), random_images(1, 40, 60, seed=1), mask=mask)


@pytest.fixture(scope="module")
def clipseg(host) -> Segmenter:
    """A random CLIPSeg, read from models/clipseg/small."""
    return Segmenter(write_clipseg(host.base / "models" / "clipseg" / "small"))


@pytest.fixture(scope="module")
def by_word(clipseg) -> dict[str, object]:
    """Two smooth images, and inputs that cut the likelier third of them out, with a third about it to be found."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 64), indexing="ij")
    image = torch.stack([torch.stack([y, x, 1 - y], dim=-1), torch.stack([x, 1 - x, y], dim=-1)])
    low, high = clipseg(image, "dog").quantile(torch.tensor([1 / 3, 2 / 3])).tolist()
    thresholds = {"background_below": low, "subject_above": high}
    return {"image": image, "subject_word": "dog", "segmentation_model": "small", **thresholds}


def test_a_word_is_enough(host, clipseg, by_word):
    image, low, high = (by_word[name] for name in ("image", "background_below", "subject_above"))
    found, new_mask = put(host, background=torch.zeros(1, 48, 64, 3), **by_word)
    probability = clipseg(image, "dog")
    assert (new_mask[probability >= high] == 1).all()
    assert (new_mask[probability <= low] == 0).all()
    assert ((new_mask > 0.01) & (new_mask < 0.99)).any()
    assert torch.equal(found[new_mask == 1], image[new_mask == 1])
    assert (found[new_mask == 0] == 0).all()


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 1, 64, 64)])
@pytest.mark.parametrize("shade", [0.0, 1.0])  # as Load Image gives it beside an opaque picture, and inverted
def test_a_mask_that_says_nothing_is_as_good_as_none(host, by_word, shape, shade, caplog):
    blank, background = torch.full(shape, shade), torch.zeros(1, 48, 64, 3)
    with caplog.at_level("INFO"):
        found, new_mask = put(host, background=background, mask=blank, **by_word)
    assert "The mask says nothing, because its picture has no transparency" in caplog.text
    expected, expected_mask = put(host, background=background, **by_word)
    assert torch.equal(found, expected)
    assert torch.equal(new_mask, expected_mask)
    with pytest.raises(ValueError, match="The mask says nothing, .*: disconnect it.*model has to.* run hf download"):
        put(host, background=background, mask=blank, **{**by_word, "segmentation_model": "gone"})


def test_work_shows_progress_and_can_be_cancelled(host, by_word):
    import comfy.model_management as management
    import comfy.utils

    image, shown = random_images(3, 40, 60), []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: shown.append((value, total)))
    try:
        put(host, image, image, mask=square())
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    # Since 0.9.2 the host passes on the first update and the last, and those between as time goes by.
    assert (shown[0], shown[-1]) == ((1, 3), (3, 3))
    assert shown == sorted(shown)
    assert {total for _, total in shown} == {3}
    for arguments in (by_word, {"image": image, "mask": square()}):
        management.interrupt_current_processing()
        with pytest.raises(management.InterruptProcessingException):
            put(host, background=image, **arguments)


def test_the_host_can_take_the_model_away(host, clipseg):
    import comfy.model_management as management

    (image,) = random_images(1, 40, 60)
    hosted = host.module("nodes.host.managed").ManagedSegmenter(host.base / "models" / "clipseg" / "small")
    first = hosted(image, "cat")
    assert hosted.patcher in management.loaded_models()
    management.unload_all_models()
    assert torch.equal(hosted(image, "cat"), first)
    assert torch.equal(clipseg(image[None], "cat")[0], first)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"subject_word": " "}, "The subject word is empty: write what is to be cut out"),
        ({"subject_above": 1.0}, r"No subject was found: its probability is 0\.\d\d at most, and 1.00 is needed"),
        ({"background_below": 0.7, "subject_above": 0.6}, "threshold 0.70 is not below the subject's 0.60"),
        (
            {"segmentation_model": "gone"},
            '"gone" was not found in .*clipseg: connect a mask instead, or run hf download',
        ),
        ({"segmentation_model": "(no model found)"}, "No CLIPSeg model was found in .*clipseg: connect a mask instead"),
    ],
)
def test_what_cannot_be_cut_out_gets_one_sentence(host, by_word, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        put(host, background=random_images(1, 40, 60), **{**by_word, **inputs})


def test_missing_pymatting_gets_one_sentence(host, by_word, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymatting", None)
    with pytest.raises(
        ValueError, match="Cutting a subject out without a mask needs the package pymatting, .* run pip"
    ):
        put(host, background=random_images(1, 40, 60), **by_word)


def test_models_are_listed(host, clipseg):
    (options,) = [
        each.options
        for each in host.nodes["BLIPDiffusionSubjectOnBackground"].define_schema().inputs
        if each.id == "segmentation_model"
    ]
    assert options == ["small"]
