"""Plain data of any content gives values of the right types, or one sentence with the file's name."""

from __future__ import annotations

from typing import Annotated

import pytest

from blip_qformer.encoder import SubjectEncoderConfig
from blip_qformer.plain_data import PlainDataError, parse_json, read_bytes, shown, validate, whole_number


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
        (b"\xff", "invalid start byte"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
    ],
)
def test_what_is_no_json_is_named(content, reason):
    with pytest.raises(PlainDataError, match=rf"^x\.json is not valid JSON \(.*{reason}.*\): download it again\.$"):
        parse_json(content, "x.json")


def test_a_file_larger_than_its_kind_is_not_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * 1001)
    assert len(read_bytes(tmp_path / "config.json", 1001)) == 1001
    with pytest.raises(PlainDataError, match=r"config\.json has more than 0\.001 MB"):
        read_bytes(tmp_path / "config.json", 1000)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("vision.layers", 1_000_000, r"sets vision\.layers to 1000000, where a whole number from 1 to 64 is needed\."),
        ("vision.layers", 0, "to 0, where a whole number from 1 to 64"),
        ("vision.layers", -1, "to -1, where"),
        ("vision.layers", "3", "to '3', where"),
        ("vision.layers", True, "to True, where"),
        ("vision.layers", 2.0, "to 2.0, where"),
        ("vision.layers", [3], r"to \[3\], where"),
        ("vision.layers", None, "to None, where"),
        ("vision.width", 10**400, r"to 1000\d*\.\.\.\d*, where a whole number from 1 to 16384"),
        ("vision.heads", 7, "its header, vision: a width of 1024 cannot be shared by 7 heads"),
        ("vision.image_size", 5, "an image of 5 pixels has no patch of 14"),
        ("qformer.cross_attention_frequency", 0, "a whole number from 1 to 64"),
        ("qformer.layer_norm_eps", "x", "to 'x', where a number from 0 to 1"),
        ("qformer.layer_norm_eps", float("nan"), "to nan, where a number from 0 to 1"),
        ("qformer.layer_norm_eps", 10**400, "where a number from 0 to 1"),
        ("qformer", [], r"sets qformer to \[\], where a mapping is needed"),
        ("projection_width", "x" * 10_000, r"to 'x+\.\.\.x+', where"),
        ("experts", 8, "sets experts, which is not known"),
        ("vision.experts", 8, r"sets vision\.experts, which is not known"),
    ],
)
def test_sizes_of_wrong_kinds_are_named(name, value, sentence):
    values = SubjectEncoderConfig().to_dict()
    *groups, last = name.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[last] = value
    with pytest.raises(PlainDataError, match=sentence):
        SubjectEncoderConfig.from_dict(values, "its header")


def test_the_published_sizes_come_back():
    assert SubjectEncoderConfig.from_dict(SubjectEncoderConfig().to_dict()) == SubjectEncoderConfig()


def test_a_number_of_ten_thousand_digits_is_shown_short():
    with pytest.raises(PlainDataError, match="is a number of thousands of digits, where a whole number from 0 to 9"):
        validate(Annotated[int, whole_number(0, 9)], 10**10_000, "it")
    assert len(shown("x" * 10_000)) <= 62
