"""Images that people bring."""

from __future__ import annotations

import io

import pytest

from blip_qformer.imaging.image_files import UnreadableImageError, check_jpeg_scans, open_upright
from tests.images import jpeg, with_scans


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_camera_s_jpeg_is_read_whatever_stands_behind_it(tmp_path, options):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(**options) + b"\xff\xda" * 1000)  # as the film behind a moving picture may hold
    assert open_upright(path).size == (64, 64)


def test_a_jpeg_that_makes_its_decoder_work_without_end_is_named(tmp_path):
    """Found from outside: 2 MB with 166,700 scans kept a core busy for minutes."""
    path = tmp_path / "a.jpg"
    path.write_bytes(with_scans(jpeg(progressive=True), 1000))
    with pytest.raises(UnreadableImageError, match="more than 100 scans") as error:
        open_upright(path)
    assert str(path) in str(error.value)


def test_what_is_no_jpeg_is_not_counted():
    file = io.BytesIO(b"\x89PNG" + b"\xff\xda" * 1000)
    check_jpeg_scans(file)
    assert file.tell() == 0


def test_of_what_is_no_jpeg_nothing_more_is_read(tmp_path):
    """A file of gigabytes that is no image is refused without filling the memory."""

    class Counting(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            content = super().read(count)
            sizes.append(len(content))
            return content

    sizes: list[int] = []
    check_jpeg_scans(Counting(bytes(1000)))
    assert sum(sizes) == 2
