"""BLIP-2 Subject Encode: batches, masks, memory, and images that nobody expects."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.host import InputList


def encode(host, loaded, image, **inputs):
    inputs = {"subject_word": "dog", **inputs}
    return host.run("BLIPDiffusionSubjectEncode", qformer=loaded.qformer, image=image, **inputs)[0]


def test_a_batch_is_one_subject_or_one_each(host, loaded):
    views = torch.rand(3, 70, 50, 3)
    together = encode(host, loaded, views)
    each = encode(host, loaded, views, average_batch=False)
    assert (len(together), len(each)) == (1, 3)
    torch.testing.assert_close(together.vectors[0], each.vectors.mean(0))
    torch.testing.assert_close(each.vectors[1:2], encode(host, loaded, views[1:2]).vectors, atol=1e-5, rtol=0)
    assert together.word == "dog"


def test_a_list_is_one_subject_as_a_batch_is(host, loaded):
    views = torch.rand(3, 70, 50, 3)
    together = encode(host, loaded, InputList(views.split(1)))
    assert torch.equal(together.vectors, encode(host, loaded, views).vectors)
    assert together.source == encode(host, loaded, views).source


def test_a_list_of_several_sizes_and_kinds_is_one_subject(host, loaded):
    small, large, clear = torch.rand(1, 30, 50, 3), torch.rand(2, 90, 70, 3), torch.rand(1, 30, 50, 4)
    clear[..., 3] = (clear[..., 3] > 0.5).float()
    on_white = torch.where(clear[..., 3:] == 1, clear[..., :3], 1.0)
    each = [encode(host, loaded, image, average_batch=False).vectors for image in (small, large, on_white)]
    together = encode(host, loaded, InputList([small, large, clear]), average_batch=False)
    torch.testing.assert_close(together.vectors, torch.cat(each), atol=1e-5, rtol=0)
    average = encode(host, loaded, InputList([small, large, clear]))
    torch.testing.assert_close(average.vectors[0], torch.cat(each).mean(0), atol=1e-5, rtol=0)


def test_a_stock_folder_of_pictures_is_one_subject(host, loaded):
    folder = host.base / "input" / "views"
    folder.mkdir()
    for number, size in enumerate([(40, 30), (30, 60)]):
        pixels = (torch.rand(size[1], size[0], 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (images,) = host.run("LoadImageDataSetFromFolder", folder="views")
    assert len(images) == 2
    each = [encode(host, loaded, image).vectors for image in images]
    together = encode(host, loaded, InputList(images))
    torch.testing.assert_close(together.vectors, torch.stack(each).mean(0), atol=1e-5, rtol=0)


def test_masks_belong_to_the_pictures_of_a_list(host, loaded):
    images = [torch.rand(1, 40, 60, 3), torch.rand(2, 60, 40, 3)]
    masks = [torch.zeros(len(image), *image.shape[1:3]) for image in images]
    for mask in masks:
        mask[:, 10:30, 5:25] = 1
    each = [
        encode(host, loaded, image, mask=mask, average_batch=False).vectors
        for image, mask in zip(images, masks, strict=True)
    ]
    one_by_one = [mask for batch in masks for mask in batch.split(1)]
    for given in (masks, one_by_one):
        found = encode(host, loaded, InputList(images), mask=InputList(given), average_batch=False)
        torch.testing.assert_close(found.vectors, torch.cat(each), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"There are 3 picture\(s\) but 4 masks: give one mask for all pictures"):
        encode(host, loaded, InputList(images), mask=InputList([*one_by_one, masks[0]]))


def test_several_words_for_one_subject_are_refused(host, loaded):
    image = torch.rand(1, 20, 20, 3)
    with pytest.raises(ValueError, match="subject_word is a list of 2, but this node takes one"):
        encode(host, loaded, image, subject_word=InputList(["dog", "cat"]))
    same = encode(host, loaded, image, subject_word=InputList(["dog", "dog"]))
    assert torch.equal(same.vectors, encode(host, loaded, image).vectors)


@pytest.mark.parametrize("size", [(48, 96), (64, 64)])  # the second is that of the mask itself
def test_load_images_mask_of_an_opaque_picture_is_no_mask(host, loaded, size):
    pixels = (torch.rand(*size, 3) * 255).byte().numpy()
    Image.fromarray(pixels).save(host.base / "input" / "opaque.png")
    image, mask = host.run("LoadImage", image="opaque.png")
    assert mask.shape == (1, 64, 64)
    (inverted,) = host.run("InvertMask", mask=mask)
    plain = encode(host, loaded, image)
    for blank in (mask, inverted):
        assert torch.equal(encode(host, loaded, image, mask=blank).vectors, plain.vectors)


def test_a_mask_with_an_axis_for_its_channel_is_one_mask(host, loaded):
    mask = torch.zeros(1, 60, 60)
    mask[:, 10:40, 20:50] = 1
    image = torch.rand(1, 60, 60, 3)
    expected = encode(host, loaded, image, mask=mask)
    assert torch.equal(encode(host, loaded, image, mask=mask[:, None]).vectors, expected.vectors)


def test_large_batches_go_in_pieces(host, loaded, monkeypatch):
    sizes = []
    forward = type(loaded.qformer.encoder).forward
    monkeypatch.setattr(
        type(loaded.qformer.encoder),
        "forward",
        lambda self, pixel_values, words: sizes.append(len(pixel_values)) or forward(self, pixel_values, words),
    )
    assert len(encode(host, loaded, torch.rand(19, 20, 20, 3), average_batch=False)) == 19
    assert sizes == [8, 8, 3]


def test_encoding_can_be_cancelled(host, loaded):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        encode(host, loaded, torch.rand(1, 20, 20, 3))
    assert len(encode(host, loaded, torch.rand(1, 20, 20, 3))) == 1  # the next one runs


def test_a_mask_hides_what_is_not_the_subject(host, loaded):
    mask = torch.zeros(1, 60, 60)
    mask[:, 10:40, 20:50] = 1
    image = torch.rand(1, 60, 60, 3)
    elsewhere = image.clone()
    elsewhere[:, 50:] = 0
    plain = [encode(host, loaded, each).vectors for each in (image, elsewhere)]
    masked = [encode(host, loaded, each, mask=mask).vectors for each in (image, elsewhere)]
    assert not torch.equal(*plain)
    assert torch.equal(*masked)


@pytest.mark.parametrize("preprocessing", ["crop", "squash", "pad"])
def test_preprocessing_is_the_chosen_one(host, loaded, preprocessing):
    from blip_qformer.encoder import preprocess

    image = torch.rand(1, 40, 90, 3)
    size = loaded.qformer.encoder.config.vision.image_size
    expected = loaded.qformer.encoder(preprocess(image, preprocessing, size=size), ["dog"])
    assert torch.allclose(encode(host, loaded, image, preprocessing=preprocessing).vectors, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 64, 64, 1), (1, 64, 64, 4), (1, 8000, 8000, 3)])
def test_odd_pictures_work(host, loaded, shape):
    assert torch.isfinite(encode(host, loaded, torch.rand(1, 1, 1, shape[-1]).expand(shape)).vectors).all()


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"image": torch.full((1, 9, 9, 3), float("nan"))}, "NaN or infinite"),
        ({"mask": torch.ones(1, 9, 30)}, "The mask is 30 x 9 pixels and the picture 9 x 9"),
        ({"mask": torch.zeros(1, 9, 9)}, "marks no subject"),
        ({"subject_word": ""}, "The subject word is empty"),
        ({"subject_word": "word " * 600}, "600 tokens long"),
        ({"subject_word": "🐕"}, "knows no part of"),
    ],
)
def test_what_cannot_be_encoded_gets_one_sentence(host, loaded, inputs, sentence):
    inputs = {"image": torch.rand(1, 9, 9, 3), **inputs}
    with pytest.raises(ValueError, match=sentence):
        encode(host, loaded, **inputs)


def test_a_chinese_word_is_read(host, loaded):
    image = torch.rand(1, 9, 9, 3)
    assert not torch.equal(
        encode(host, loaded, image, subject_word="小狗").vectors, encode(host, loaded, image).vectors
    )
