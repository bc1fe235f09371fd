"""A pair and its files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from blip_qformer.data.pairs import EncodedPair, decode_pair
from blip_qformer.data.stream import PairStream
from tests.data.examples import COUNT, first, make_pair
from tests.images import bomb, jpeg, with_scans


def test_a_pair_comes_back(shards):
    pairs = {pair.key: pair for pair in first(PairStream(shards), COUNT)}
    assert len(pairs) == COUNT
    for number in range(COUNT):
        found, expected = pairs[f"{number:04d}"], make_pair(number)
        assert (found.word, found.caption, found.extra) == (expected.word, expected.caption, expected.extra)
        for role in ("subject", "target"):
            difference = np.array(getattr(found, role), float) - np.array(getattr(expected, role), float)
            assert getattr(found, role).mode == "RGB"
            assert np.abs(difference).mean() < 4  # lossy


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG"])
def test_images_of_other_formats_are_read(tmp_path, ending):
    pair = make_pair(0)
    for role in ("subject", "target"):
        getattr(pair, role).save(tmp_path / f"a.{role}.{ending}")
    (tmp_path / "a.json").write_text('{"word": "dog", "caption": "a dog"}')
    (found,) = first(PairStream(tmp_path), 1)
    assert np.abs(np.array(found.target, float) - np.array(pair.target, float)).mean() < 4


def test_any_caption_is_read_but_none_at_all(tmp_path, caplog):
    """It is not the word that the Q-Former is asked about: signs and length are for the text encoder to cut."""
    captions = {"a": "a dog 🐕 in the snow", "b": "🐕", "c": "dog " * 600, "d": "  "}
    for key, caption in captions.items():
        for role in ("subject", "target"):
            getattr(make_pair(0), role).save(tmp_path / f"{key}.{role}.png")
        (tmp_path / f"{key}.json").write_text(json.dumps({"word": "dog", "caption": caption}))
    found = first(PairStream(tmp_path), 3)
    assert {pair.key: pair.caption for pair in found} == {key: captions[key] for key in "abc"}
    assert all("its caption is empty" in message for message in caplog.messages)


def test_an_image_that_claims_more_pixels_than_a_pair_may_have_is_refused_by_its_header():
    """Case 82094 of the long fuzz run: 454 bytes of WebP claimed 12151 x 9330 pixels and took 432 MB."""
    files = {"json": b'{"word": "dog", "caption": "a dog"}', "subject.jpg": jpeg(), "target.png": bomb(10_648)}
    with pytest.raises(ValueError, match="^its target picture has 113 million pixels: scale it down$"):
        decode_pair(EncodedPair("a", files, ""))


def test_an_image_that_makes_its_decoder_work_without_end_is_refused():
    files = {"json": b'{"word": "dog", "caption": "a dog"}', "subject.jpg": jpeg(), "target.jpg": jpeg()}
    assert decode_pair(EncodedPair("a", files, "")).word == "dog"
    files["target.jpg"] = with_scans(jpeg(progressive=True), 200)
    with pytest.raises(ValueError, match="more than 100 scans"):
        decode_pair(EncodedPair("a", files, ""))
