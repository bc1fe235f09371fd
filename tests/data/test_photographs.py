"""Pairs from photographs and a metadata.jsonl, by masks and by CLIPSeg, and through the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip_qformer.cli.prepare import add_prepare_command
from blip_qformer.data.photographs import Photographs, parse_annotation
from blip_qformer.data.prepare import SkippedPairError, prepare
from blip_qformer.data.stream import PairStream
from blip_qformer.imaging.segmentation import Segmenter
from tests.clipseg import write_clipseg
from tests.images import bomb

RED, BLUE, GREEN = (220, 40, 30), (30, 60, 220), (40, 200, 50)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A red square on blue with its mask, and a green background; metadata is written by each test."""
    photograph = np.full((60, 80, 3), BLUE, np.uint8)
    photograph[10:50, 20:70] = RED
    mask = np.zeros((60, 80), np.uint8)
    mask[10:50, 20:70] = 255
    (tmp_path / "photographs").mkdir()
    (tmp_path / "backgrounds" / "grass").mkdir(parents=True)
    Image.fromarray(photograph).save(tmp_path / "photographs" / "square.png")
    Image.fromarray(mask).save(tmp_path / "photographs" / "mask.png")
    Image.new("RGB", (50, 40), GREEN).save(tmp_path / "backgrounds" / "grass" / "green.png")
    return tmp_path


LINE = {"file": "square.png", "word": "cube", "caption": "a red cube", "mask": "mask.png"}


def source(folder: Path, *lines: dict | str, **inputs) -> Photographs:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "photographs" / "metadata.jsonl").write_text(text)
    return Photographs(folder / "photographs", folder / "backgrounds", **inputs)


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    """Those of more than a twentieth of the pixels, coarsely."""
    pixels = np.array(image).reshape(-1, 3) // 16
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(colour) for colour, count in zip(found.tolist(), counts, strict=True) if count > len(pixels) / 20}


def coarse(*named: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {tuple(value // 16 for value in colour) for colour in named}


def test_the_subject_leaves_its_background(folder):
    pair = source(folder, LINE).pair(0, seed=0)
    assert (pair.key, pair.word, pair.caption) == ("00000000", "cube", "a red cube")
    assert pair.extra == {"file": "square.png"}
    assert np.array_equal(np.array(pair.target), np.array(Image.open(folder / "photographs" / "square.png")))
    assert colours(pair.subject) == coarse(RED, GREEN)


def test_pairs_are_a_function_of_seed_and_index(folder):
    photographs = source(folder, LINE, LINE)
    first = np.array(photographs.pair(0, 5).subject)
    assert np.array_equal(first, np.array(photographs.pair(0, 5).subject))
    assert not np.array_equal(first, np.array(photographs.pair(1, 5).subject))
    assert not np.array_equal(first, np.array(photographs.pair(0, 6).subject))


def test_large_photographs_are_scaled_down(folder):
    Image.open(folder / "photographs" / "square.png").resize((400, 300)).save(folder / "photographs" / "large.jpg")
    pair = source(folder, {**LINE, "file": "large.jpg"}, short_edge=90).pair(0, 0)
    assert pair.target.size == pair.subject.size == (120, 90)


def test_a_photograph_is_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = Image.open(folder / "photographs" / "square.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "photographs" / "turned.png", exif=exif)
    pair = source(folder, {**LINE, "file": "turned.png"}).pair(0, 0)
    assert np.array_equal(np.array(pair.target), np.array(Image.open(folder / "photographs" / "square.png")))


def test_a_box_leaves_out_what_is_beside_it(folder):
    """Half of what the mask shows."""
    box = [20 / 80, 10 / 60, 45 / 80, 50 / 60]
    pair = source(folder, {**LINE, "box": box, "area": 0.4}).pair(0, 0)
    pixels = np.array(pair.subject).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 150) & (pixels[..., 1] < 100))
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(26 / 40, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"word": "woman"}, "a person", "square.png: woman"),
        ({"word": "palm tree"}, "clutter", "square.png: palm tree"),
        ({"is_group": True}, "a group", "square.png: cube"),
        ({"is_inside": 1}, "a view from inside", ""),
        ({"box": [0, 0, 0.2, 1]}, "too elongated", ""),
        ({"box": [0, 0, 0.4, 0.4]}, "too small", ""),
        ({"box": [0, 0, 1, 0.9]}, "too large", ""),
        ({"box": [0, 0, 0.6, 0.9], "area": 0}, "too small", ""),
        ({"area": 0.9}, "too large", ""),
        ({"mask": "white.png"}, "too large", ""),
        ({"mask": "thin.png"}, "too elongated", ""),
        ({"mask": "black.png"}, "no subject found", "its probability is 0.00 at most"),
        ({"file": "tiny.png", "mask": "tiny.png"}, "not to be cut out", "1 x 1 pixels, too small"),
        ({"mask": "wide.png"}, "mask of another shape", "The mask is 60 x 20 pixels"),
        ({"mask": "gone.png"}, "unreadable mask", "gone.png"),
        ({"mask": None}, "no mask", "give a folder with CLIPSeg"),
        ({"file": "gone.png"}, "unreadable photograph", "gone.png"),
        ({"file": "cut.png"}, "unreadable photograph", "cut.png"),
        ({"file": "empty.png"}, "unreadable photograph", "empty.png"),
        ({"file": "page.png"}, "unreadable photograph", "page.png is a web page that was saved in place of the file"),
        ({"file": "bomb.png"}, "unreadable photograph", "bomb.png has more than 179 million pixels: scale it down"),
        ({"file": "cut.avif"}, "unreadable photograph", "cut.avif is no picture that can be read ("),
        ({"mask": "bomb.png"}, "unreadable mask", "bomb.png has more than 179 million pixels"),
        ({"file": "../backgrounds/grass/green.png"}, "bad line", "does not lie in the photographs' folder"),
        ({"file": "/etc/hostname"}, "bad line", "does not lie in the photographs' folder"),
        ({"mask": "masks/../../mask.png"}, "bad line", "does not lie in the photographs' folder"),
        ({"mask": "\\\\server\\share\\mask.png"}, "bad line", "does not lie in the photographs' folder"),
        ({"file": "C:mask.png"}, "bad line", "does not lie in the photographs' folder"),
        ({"file": ""}, "bad line", "file or word is empty"),
        ({"file": 3}, "bad line", "file, caption or mask is no text"),
        ({"word": " "}, "bad line", "file or word is empty"),
        ({"word": None}, "bad line", ""),
        ({"box": [0, 0, 2, 1]}, "bad line", "is not left, top, right, bottom"),
        ({"box": [0, 0, 1]}, "bad line", ""),
        ({"area": "large"}, "bad line", "large"),
        ({"area": float("nan")}, "bad line", "the area nan is no fraction"),
        ({"area": 10**400}, "bad line", "OverflowError"),
        ({"caption": "half a character: \ud800"}, "bad line", "surrogates not allowed"),
        ({"caption": "x" * 70_000}, "bad line", "it has 70"),
    ],
)
def test_what_is_skipped_and_why(folder, changes, reason, detail):
    photographs = folder / "photographs"
    for name, size, rows in (
        ("white", (80, 60), 60),
        ("thin", (80, 60), 30),
        ("black", (80, 60), 0),
        ("wide", (60, 20), 9),
    ):
        mask = np.zeros(size[::-1], np.uint8)
        mask[:rows] = 255
        Image.fromarray(mask).save(photographs / f"{name}.png")
    content = (photographs / "square.png").read_bytes()
    (photographs / "cut.png").write_bytes(content[: len(content) // 2])
    (photographs / "empty.png").write_bytes(b"")
    (photographs / "page.png").write_text("<html>")
    (photographs / "bomb.png").write_bytes(bomb(20_000))
    Image.open(photographs / "square.png").save(photographs / "cut.avif")
    (photographs / "cut.avif").write_bytes((photographs / "cut.avif").read_bytes()[:-200])
    Image.new("RGB", (1, 1), "white").save(photographs / "tiny.png")
    with pytest.raises(SkippedPairError) as skipped:
        source(folder, {**LINE, **changes}).pair(0, 0)
    assert skipped.value.reason == reason
    assert detail in skipped.value.detail


@pytest.mark.parametrize("text", [b"{", b"[]", b"7", b"\xff\xfe", b'{"word": "dog"}'])
def test_bad_lines(text):
    with pytest.raises(SkippedPairError) as skipped:
        parse_annotation(text)
    assert skipped.value.reason == "bad line"


def test_a_missing_caption_is_the_word():
    assert parse_annotation(b'{"file": "a.jpg", "word": "dog", "LabelName": "/m/0bt9lr"}').caption == "a dog"


def test_broken_backgrounds_are_passed_over(folder):
    for number in range(3):
        (folder / "backgrounds" / f"{number}.jpg").write_bytes(b"broken")
    assert colours(source(folder, LINE).pair(0, 0).subject) == coarse(RED, GREEN)
    (folder / "backgrounds" / "grass" / "green.png").write_bytes(b"")
    with pytest.raises(SkippedPairError, match="unreadable background"):
        source(folder, LINE).pair(0, 0)


def test_clipseg_finds_the_subject_where_there_is_no_mask(folder):
    """A random CLIPSeg: the higher half of what it says counts as found."""
    line = {**LINE, "mask": None, "area": 0.5}
    clipseg = write_clipseg(folder / "clipseg")
    pixels = np.array(Image.open(folder / "photographs" / "square.png"))
    probability = Segmenter(clipseg)(torch.from_numpy(pixels)[None] / 255, "cube")
    thresholds = tuple(probability.quantile(torch.tensor([0.4, 0.6])).tolist())
    pair = source(folder, line, segmentation=clipseg, thresholds=thresholds).pair(0, 0)
    from_background = (np.array(pair.subject) == GREEN).all(axis=-1)
    assert 0.05 < from_background.mean() < 0.9
    with pytest.raises(SkippedPairError, match="no subject found"):
        source(folder, line, segmentation=clipseg, thresholds=(0.5, 1.0)).pair(0, 0)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda folder: (folder / "photographs" / "metadata.jsonl").unlink(), "has no metadata.jsonl, which says"),
        (lambda folder: (folder / "backgrounds" / "grass" / "green.png").unlink(), "holds no picture to be a backg"),
        (lambda folder: (folder / "clipseg" / "config.json").unlink(), "is no folder with a CLIPSeg checkpoint"),
    ],
)
def test_missing_folders_get_one_sentence(folder, break_it, sentence):
    source(folder, LINE)
    (folder / "clipseg").mkdir()
    (folder / "clipseg" / "config.json").write_text("{}")
    break_it(folder)
    with pytest.raises(ValueError, match=sentence):
        Photographs(folder / "photographs", folder / "backgrounds", folder / "clipseg")


def test_missing_pymatting_is_not_mistaken_for_a_bad_image(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymatting", None)
    with pytest.raises(ValueError, match="run pip install pymatting"):
        source(folder, LINE).pair(0, 0)


def test_it_goes_to_other_processes(folder):
    photographs = source(folder, LINE)
    expected = np.array(photographs.pair(0, 1).subject)
    assert np.array_equal(np.array(pickle.loads(pickle.dumps(photographs)).pair(0, 1).subject), expected)


@pytest.fixture
def two_threads():
    """In this process; tests have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_workers_cut_out_to_the_last_bit_alike(folder, two_threads):
    """CLIPSeg and matting in processes of their own and in this one, whatever number of threads it has."""
    write_clipseg(folder / "clipseg")
    unmasked = {**LINE, "mask": None, "area": 0.5}
    photographs = source(folder, LINE, unmasked, segmentation=folder / "clipseg", thresholds=(0.4, 0.8))
    made = {}
    for workers in (1, 2):
        target = folder / f"by-{workers}"
        prepare(photographs, target, seed=1, workers=workers, pairs_per_shard=1)
        made[workers] = {file.name: file.read_bytes() for file in sorted(target.iterdir())}
    assert len([name for name in made[1] if name.endswith(".tar")]) == 2
    assert len(made[1]["skipped.txt"].splitlines()) == 1  # its head
    assert made[1] == made[2]


def prepare_command(*words: str) -> None:
    """`blip-qformer prepare` with these words."""
    parser = argparse.ArgumentParser()
    add_prepare_command(parser.add_subparsers())
    arguments = parser.parse_args(["prepare", *map(str, words)])
    arguments.command(arguments)


def test_the_command(folder, capsys):
    source(folder, LINE, "{", LINE)
    words = (folder / "photographs", folder / "pairs", "--backgrounds", folder / "backgrounds", "--workers", "1")
    prepare_command(*words)
    assert capsys.readouterr().out == f"Wrote 2 pairs in 1 shards to {folder / 'pairs'}.\nSkipped 1: bad line.\n"
    assert {pair.key for pair in itertools.islice(iter(PairStream(folder / "pairs")), 2)} == {"00000000", "00000002"}
    with pytest.raises(ValueError, match="was made with seed 0 instead of 1"):
        prepare_command(*words, "--seed", "1")
    Image.new("RGB", (8, 8)).save(folder / "backgrounds" / "new.png")
    with pytest.raises(ValueError, match="was made with backgrounds '.*' instead of"):
        prepare_command(*words)
    with pytest.raises(ValueError, match="--backgrounds"):
        prepare_command(*words[:2])
    with pytest.raises(ValueError, match="has no metadata.jsonl"):
        prepare_command(folder / "backgrounds", folder / "pairs")


@pytest.mark.parametrize("line", [b"[" * 60_000, b'{"a":' * 10_000, b"[]", b"null", b"\xff", b"9" * 5000])
def test_lines_that_are_no_annotation_are_skipped(line):
    """One of them must not end the preparation of all the others."""
    with pytest.raises(SkippedPairError, match="bad line"):
        parse_annotation(line)
