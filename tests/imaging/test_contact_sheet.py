"""Images on a sheet: where they stand, that they stay as they are, and sizes nobody expected."""

from __future__ import annotations

import itertools

import pytest
import torch

from blip_qformer.imaging.contact_sheet import contact_sheet, letterbox, make_layout, render_label


def test_images_stay_bit_by_bit_in_reading_order():
    images = torch.rand(4, 64, 128, 3)
    sheet = contact_sheet(images)
    assert sheet.shape == (1, 2 * 64 + 3, 2 * 128 + 3, 3)
    for index, image in enumerate(images):
        top, left = 1 + (index // 2) * 65, 1 + (index % 2) * 129
        assert torch.equal(sheet[0, top : top + 64, left : left + 128], image)
    assert (sheet[0, 0] == 1).all()


def test_a_line_has_its_sources_at_the_ends():
    layout = make_layout(5, [True, True])
    assert (layout.rows, layout.columns) == (1, 7)
    assert (layout.images[0], layout.images[-1], layout.sources[:2]) == ((0, 1), (0, 5), ((0, 0), (0, 6)))
    broken = make_layout(5, [True, True], columns=3)
    assert (broken.rows, broken.columns) == (2, 5)
    assert broken.sources[:2] == ((0, 0), (1, 4))


def test_a_square_has_its_sources_at_the_corners():
    layout = make_layout(9, [True] * 4)
    assert (layout.rows, layout.columns) == (3, 5)
    assert layout.images[4] == (1, 2)
    assert layout.sources == ((0, 0), (0, 4), (2, 0), (2, 4))


def test_no_two_images_share_a_cell():
    for count, sources, columns in itertools.product([1, 2, 3, 5, 16], range(16), [0, 1, 3, 64]):
        present = [bool(sources >> bit & 1) for bit in range(4)]
        layout = make_layout(count, present, columns)
        cells = [*layout.images, *(cell for cell, there in zip(layout.sources, present, strict=True) if there)]
        assert len(set(cells)) == len(cells), (count, present, columns)
        assert all(0 <= row < layout.rows and 0 <= column < layout.columns for row, column in cells)


def test_sources_of_any_size_fit():
    for size, channels in itertools.product([(1, 1), (64, 64), (3, 500), (500, 3), (64, 65)], [1, 3, 4]):
        source = torch.rand(2, *size, channels)
        sheet = contact_sheet(
            torch.rand(1, 48, 64, 3), (source, None, None, source), labels=["one", "", "a long one" * 9]
        )
        assert torch.isfinite(sheet).all(), (size, channels)
        assert sheet.min() >= 0, (size, channels)
        assert sheet.max() <= 1, (size, channels)


def test_a_source_is_shown_whole_in_the_middle():
    shown = letterbox(torch.zeros(1, 10, 20, 3), 40, 40)
    assert (shown[:, 10:30] == 0).all()
    assert (shown[:, :10] == 1).all()
    assert (shown[:, 30:] == 1).all()


def test_labels_stand_below_their_pictures():
    images = torch.zeros(2, 64, 64, 3)
    sheet = contact_sheet(images, columns=2, labels=["x 0.00"])
    strips = sheet[0, 65 : 65 + 12, 1:65], sheet[0, 65 : 65 + 12, 66:130]
    assert strips[0].min() < 0.5
    assert (strips[1] == 1).all()
    assert contact_sheet(images, labels=["a", "b", "too", "many"]).shape == contact_sheet(images, labels="ab").shape


@pytest.mark.parametrize("text", ["x 0.25, y 0.50", "小狗", "🐕", "long " * 100, " ", "i"])
def test_any_label_is_drawn_inside_its_strip(text):
    label = render_label(text, 20, 100)
    assert label.shape == (20, 100)
    assert text == " " or label.min() < 1


def test_a_large_sheet_is_drawn_smaller():
    sheet = contact_sheet(torch.rand(1, 50, 50, 3).expand(100, -1, -1, -1), labels=["a"] * 100, longest_side=200)
    assert max(sheet.shape) <= 200
    assert min(sheet.shape[1:3]) > 100


def test_nan_is_drawn_black():
    assert torch.isfinite(contact_sheet(torch.full((1, 8, 8, 3), float("nan")))).all()
