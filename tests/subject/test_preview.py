"""The small picture of a subject: what it shows, what a blend shows, and what is refused in a file from elsewhere."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip_qformer import Subject
from blip_qformer.limits import MAX_PREVIEW_BYTES
from blip_qformer.subject import blend, trajectory
from blip_qformer.subject.file import COVERS, load_subject, save_subject
from blip_qformer.subject.preview import checked_preview, join_previews, make_preview, preview_image
from tests.images import jpeg, with_scans

RED, GREEN, BLUE, WHITE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)


def plain(*colours: tuple[int, int, int]) -> torch.Tensor:
    """Square images of one colour each, [N, 3, 64, 64]."""
    return torch.tensor(colours, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 64, 64)


def colour(preview: bytes, row: int, column: int) -> tuple[int, ...]:
    """The colour at a point, of which a JPEG keeps about a hundredth."""
    image = preview_image(preview)
    assert image is not None
    return tuple(round(value) for value in image[0, row, column].tolist())


def as_jpeg(width: int, height: int, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(content, format=kind)
    return content.getvalue()


def subject(preview: bytes = b"", value: float = 1.0, word: str = "dog") -> Subject:
    return Subject(torch.full((1, 16, 8), value), word, preview=preview)


def test_one_image_fills_it_and_several_are_tiles():
    one = make_preview(plain(RED))
    assert preview_image(one).shape == (1, 256, 256, 3)
    assert colour(one, 10, 10) == colour(one, 250, 250) == RED
    two = make_preview(plain(RED, GREEN))
    assert preview_image(two).shape == (1, 128, 256, 3)
    assert (colour(two, 64, 64), colour(two, 64, 192)) == (RED, GREEN)
    many = make_preview(plain(RED, GREEN, BLUE, RED, GREEN))  # the first four
    assert preview_image(many).shape == (1, 256, 256, 3)
    assert [colour(many, y, x) for y in (64, 192) for x in (64, 192)] == [RED, GREEN, BLUE, RED]
    three = make_preview(plain(RED, GREEN, BLUE))
    assert colour(three, 192, 192) == WHITE
    assert make_preview(plain(RED)[:0]) == b""
    assert preview_image(b"") is None


def test_the_worst_case_fits_the_bound():
    noise = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert len(make_preview(noise)) < MAX_PREVIEW_BYTES
    assert checked_preview(make_preview(noise)) == make_preview(noise)


def test_a_blend_shows_what_it_was_made_of():
    red, green = (subject(make_preview(plain(each)), value) for each, value in ((RED, 1.0), (GREEN, 2.0)))
    mixed = blend([red, green], [1, 3])
    assert (colour(mixed.preview, 64, 64), colour(mixed.preview, 64, 192)) == (RED, GREEN)
    assert trajectory([red, green], 3).preview == mixed.preview
    assert blend([red, green], [1, 0]).preview == red.preview  # bit by bit the first, as its vectors
    assert blend([red, subject()], [1, 1]).preview == red.preview
    assert blend([subject(), subject()], [1, 1]).preview == b""
    assert join_previews([red.preview] * 3) == red.preview
    of_blends = blend([mixed, subject(make_preview(plain(BLUE)))], [1, 1]).preview
    assert [colour(of_blends, 64, x) for x in (32, 96, 192)] == [RED, GREEN, BLUE]
    assert colour(of_blends, 10, 64) == WHITE  # a wide tile is seen whole


def test_averages_and_rows_keep_it():
    views = Subject(torch.randn(3, 16, 8), "dog", preview=make_preview(plain(RED)))
    assert views.average().preview == views.preview


def test_it_lies_in_the_file_where_the_model_library_looks(tmp_path):
    red = subject(make_preview(plain(RED)))
    save_subject(tmp_path / "dog.safetensors", red)
    assert load_subject(tmp_path / "dog.safetensors").preview == red.preview
    assert list(load_file(tmp_path / "dog.safetensors")) == ["emb_params"]
    assert [each.name for each in tmp_path.iterdir()] == ["dog.safetensors"]
    with safe_open(tmp_path / "dog.safetensors", framework="pt") as file:
        (cover,) = json.loads(file.metadata()["ssmd_cover_images"])
    assert base64.b64decode(cover) == red.preview


def test_a_file_gets_the_picture_it_lacks_and_loses_one_that_is_not_wanted(tmp_path):
    """Its subject is the same each time: nothing is replaced, so that "overwrite" is not asked for."""
    file, red = tmp_path / "dog.safetensors", subject(make_preview(plain(RED)))
    save_subject(file, red, with_preview=False)
    assert load_subject(file).preview == b""
    assert COVERS.encode() not in file.read_bytes()
    save_subject(file, red)
    assert load_subject(file).preview == red.preview
    before = file.stat().st_mtime_ns
    save_subject(file, red)
    save_subject(file, subject())  # the same from a file of an earlier version, which has none
    save_subject(file, subject(make_preview(plain(GREEN))))
    assert file.stat().st_mtime_ns == before
    assert load_subject(file).preview == red.preview
    save_subject(file, red, with_preview=False)
    assert load_subject(file).preview == b""
    with pytest.raises(FileExistsError):
        save_subject(file, subject(make_preview(plain(RED)), value=2.0))


def encoded(content: bytes) -> str:
    return json.dumps([base64.b64encode(content).decode()])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[" * 100_000,
        "{}",
        "[]",
        "[1]",
        '["***"]',
        '["é"]',
        encoded(b"no picture"),
        encoded(as_jpeg(64, 64)[:100]),
        encoded(as_jpeg(64, 64, "PNG")),
        encoded(as_jpeg(1025, 8)),
        encoded(as_jpeg(4_000, 4_000)),
        encoded(as_jpeg(64, 64) + bytes(MAX_PREVIEW_BYTES)),
        encoded(bytes(4 * MAX_PREVIEW_BYTES)),
    ],
    ids=range(15),
)
def test_a_picture_that_cannot_be_one_is_left_out_and_the_subject_loads(tmp_path, text):
    metadata = {"format": "blip-subject", "version": "1", "word": "dog", COVERS: text}
    save_file({"emb_params": torch.ones(16, 8)}, tmp_path / "x.safetensors", metadata=metadata)
    found = load_subject(tmp_path / "x.safetensors")
    assert (found.word, found.preview) == ("dog", b"")


def test_a_picture_that_makes_its_decoder_work_without_end_is_left_out():
    """Found from outside: 100 kB of scans, of a size that previews may have, took five seconds."""
    assert checked_preview(jpeg(progressive=True))
    content = with_scans(jpeg(progressive=True), 110)
    assert len(content) <= MAX_PREVIEW_BYTES
    assert checked_preview(content) == b""


def test_a_picture_of_another_program_is_not_ours(tmp_path):
    save_file({"a": torch.ones(16, 8)}, tmp_path / "x.safetensors", metadata={COVERS: encoded(as_jpeg(64, 64))})
    assert load_subject(tmp_path / "x.safetensors", "dog").preview == b""
