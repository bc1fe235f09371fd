"""What a download leaves in the place of a file is told by its first bytes."""

import pytest
from PIL import Image

from blip_qformer.stand_in import StandIn, stand_in

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LFS_POINTER, StandIn.LFS_POINTER),
        (b"<!DOCTYPE html>\n<html>", StandIn.WEB_PAGE),
        (b"\xef\xbb\xbf \r\n<HTML lang=en>", StandIn.WEB_PAGE),
        (b"<!-- saved from url=(0022)https://huggingface.co -->\n<html>", StandIn.WEB_PAGE),
        (b'<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN">', StandIn.WEB_PAGE),
        (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>', StandIn.WEB_PAGE),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', None),
        (b"<header>", None),
        (b"{}", None),
        (b"", None),
    ],
)
def test_it_is_told_by_its_beginning(tmp_path, content, expected):
    (tmp_path / "file").write_bytes(content)
    assert stand_in(tmp_path / "file") is expected


def test_other_files_are_none(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    assert stand_in(tmp_path / "image.png") is None
    assert stand_in(tmp_path / "missing") is None
    assert stand_in(tmp_path) is None


def test_few_files_are_named_and_many_counted(tmp_path):
    files = [tmp_path / folder / "model.bin" for folder in ("a", "b", "c", "d", "e")]
    one, two, five = (StandIn.WEB_PAGE.sentence(files[:count]) for count in (1, 2, 5))
    assert one.startswith(f"{files[0]} is a web page")
    assert two.startswith(f"{tmp_path}: a/model.bin and b/model.bin are web pages")
    assert five.startswith(f"{tmp_path}: a/model.bin, b/model.bin, c/model.bin and 2 more are web pages")
