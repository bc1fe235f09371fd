"""The small world: its backgrounds, its scenes, and the pairs made of them."""

from __future__ import annotations

import colorsys
import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip_qformer.data.pairs import Pair, encode_pair
from blip_qformer.data.prepare import prepare
from blip_qformer.data.stream import PairStream
from mini.world import scenes, source
from mini.world.artwork import HELD_OUT_STYLE, Artwork
from mini.world.backgrounds import BACKGROUNDS
from mini.world.scenes import (
    Appearance,
    SubjectBox,
    apply_appearance,
    cut_out,
    join_halves,
    open_artwork,
    paste_subject,
    render_scene,
    sample_background,
    sample_varied_appearance,
    shift_hue,
)
from mini.world.source import World, artwork_of_split, readable_artwork
from tests.artwork import HELD_OUT, TRAINED, write_artwork

BY_NAME = {background.name: background for background in BACKGROUNDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_artwork(tmp_path_factory.mktemp("artwork"))


@pytest.fixture
def arrow(tmp_path) -> Artwork:
    """A piece of artwork that is 40 wide and 20 high, red on its left, and lies off the middle of its image."""
    image = Image.new("RGBA", (64, 64))
    image.paste((0, 0, 255, 255), (4, 30, 44, 50))
    image.paste((255, 0, 0, 255), (4, 30, 24, 50))
    image.save(tmp_path / "arrow.png")
    return Artwork("1", "arrow", "Objects", "noto", tmp_path / "arrow.png")


@pytest.mark.parametrize("background", BACKGROUNDS, ids=lambda background: background.name)
def test_a_background_is_a_function_of_its_seed(background):
    for size in (32, 128):
        images = [background.render(size, np.random.default_rng(seed)) for seed in (1, 1, 2)]
        assert images[0].shape == (size, size, 3)
        assert images[0].dtype == np.float32
        assert 0 <= images[0].min() <= images[0].max() <= 1
        assert np.array_equal(images[0], images[1])
        assert not np.array_equal(images[0], images[2])


def test_backgrounds_can_be_told_apart_by_their_colours():
    """The nearest mean colour of the upper and the lower half is that of the own background, nearly always."""

    def halves(background, seed):
        image = background.render(64, np.random.default_rng(seed))
        return np.concatenate([half.mean(axis=(0, 1)) for half in np.array_split(image, 2)])

    means = [np.mean([halves(background, seed) for seed in range(4)], axis=0) for background in BACKGROUNDS]
    right = [
        np.argmin([np.linalg.norm(halves(background, seed) - mean) for mean in means]) == index
        for index, background in enumerate(BACKGROUNDS)
        for seed in range(10, 20)
    ]
    assert np.mean(right) > 0.95


def test_no_phrase_names_two_backgrounds():
    phrases = [phrase for background in BACKGROUNDS for phrase in background.phrases]
    assert len(set(phrases)) == len(phrases)
    assert len(BY_NAME) == len(BACKGROUNDS) == 8


def test_the_other_background_is_another():
    rng = np.random.default_rng(0)
    for background in BACKGROUNDS:
        others = {sample_background(rng, other_than=background).name for _ in range(200)}
        assert others == BY_NAME.keys() - {background.name}
    assert {sample_background(rng).name for _ in range(200)} == BY_NAME.keys()


def test_a_cut_out_is_the_artwork_and_no_more(arrow):
    plain = cut_out(arrow, Appearance(), 80)
    assert plain.size == (80, 40)
    assert plain.getpixel((10, 20)) == (255, 0, 0, 255)
    assert plain.getpixel((70, 20)) == (0, 0, 255, 255)
    mirrored = cut_out(arrow, Appearance(mirrored=True), 80)
    assert mirrored.getpixel((70, 20)) == (255, 0, 0, 255)
    tilted = cut_out(arrow, Appearance(tilt=90), 80)
    assert tilted.size == (40, 80)
    assert tilted.getpixel((20, 70)) == (255, 0, 0, 255)  # against the clock


def test_a_stretched_and_sheared_appearance_moves_every_row_by_its_height(arrow):
    plain = cut_out(arrow, Appearance(), 80)
    wide = apply_appearance(plain, Appearance(stretch=2.0), 160)
    assert wide.size == (160, 40)
    for shear in (0.5, -0.5):
        leaning = np.asarray(apply_appearance(plain, Appearance(shear=shear), 100).getchannel("A"))
        assert leaning.shape == (40, 100)  # 80 wide, and 20 of lean
        for row in (5, 20, 35):
            moved = shear * (40 - row - 0.5) + max(-shear, 0) * 40
            assert np.nonzero(leaning[row] > 127)[0][[0, -1]] == pytest.approx([moved, moved + 79], abs=1)


def test_half_of_one_thing_stands_on_half_of_another(arrow, tmp_path):
    Image.new("RGBA", (20, 40), (0, 255, 0, 255)).save(tmp_path / "post.png")
    post = Artwork("2", "post", "Objects", "noto", tmp_path / "post.png")
    both = join_halves(arrow, post)
    assert both.size == (40, 10 + 40)  # the post is twice as wide then, and twice as high
    assert both.getpixel((5, 5)) == (255, 0, 0, 255)
    assert both.getpixel((35, 9)) == (0, 0, 255, 255)
    assert both.getpixel((20, 10)) == both.getpixel((20, 49)) == (0, 255, 0, 255)


def test_varied_appearances_change_outlines_and_stay_recognisable():
    appearances = [sample_varied_appearance(np.random.default_rng(seed)) for seed in range(200)]
    assert len({each.stretch for each in appearances}) == len({each.shear for each in appearances}) == 200
    for each in appearances:
        assert 0.66 < each.stretch < 1.5
        assert abs(each.shear) <= 0.25
        assert abs(each.tilt) <= 16
    assert np.mean([each.stretch > 1 for each in appearances]) == pytest.approx(0.5, abs=0.15)


def test_a_turned_hue_is_colorsys():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (20, 3), dtype=np.uint8)
    colours[:3] = [[0, 0, 0], [128, 128, 128], [255, 255, 255]]
    alpha = rng.integers(0, 256, (20, 1), dtype=np.uint8)
    image = Image.fromarray(np.concatenate([colours, alpha], axis=1)[None])
    for turn in (0.25, 0.6):
        found = np.asarray(shift_hue(image, turn))[0]
        assert np.array_equal(found[:, 3:], alpha)
        assert np.array_equal(found[:3, :3], colours[:3])
        for colour, result in zip(colours, found[:, :3], strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*colour / 255)
            expected = np.multiply(255, colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
            assert np.abs(result - expected).max() < 8  # Pillow counts hues in 256 steps


def test_a_subject_stands_where_its_box_is(arrow):
    scene = paste_subject(cut_out(arrow, Appearance(), 50), Image.new("RGB", (100, 200)), SubjectBox(0.5, 0.4, 0.6))
    ys, xs = np.nonzero(np.asarray(scene).max(axis=2))
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == (15, 65, 108, 133)


def test_a_scene_is_a_function_of_its_arguments(arrow):
    arguments = (arrow, Appearance(0.3, True, 5.0), BY_NAME["snow"], SubjectBox(0.6, 0.5, 0.5), 64)
    first, same, other = (np.asarray(render_scene(*arguments, seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def content(pair: Pair) -> tuple:
    return pair.key, pair.word, pair.caption, dict(pair.extra), pair.subject.tobytes(), pair.target.tobytes()


def test_a_pair_is_a_function_of_seed_and_index(folder):
    world = World(folder, count=50, edge=64)
    first = content(world.pair(7, 3))
    scenes.open_artwork.cache_clear()
    artwork_of_split.cache_clear()
    world.pair(8, 3)  # what came before does not matter
    assert content(world.pair(7, 3)) == first
    assert content(World(folder, count=9, edge=64).pair(7, 3)) == first
    assert len({content(world.pair(index, seed))[4] for index in range(5) for seed in range(3)}) == 15


def test_pairs_show_one_subject_in_front_of_two_backgrounds(folder, monkeypatch):
    monkeypatch.setattr(source, "JOINED_SHARE", 0.0)  # two halves meet in the middle, where colours are compared
    rendered = []
    monkeypatch.setattr(
        source,
        "render_background",
        lambda background, *inputs: rendered.append(background.name) or scenes.render_background(background, *inputs),
    )
    world = World(folder, count=50, edge=96)
    words, backgrounds = set(), set()
    for index in range(50):
        rendered.clear()
        pair = world.pair(index, 0)
        assert sorted(set(rendered)) == sorted(rendered)  # two, and not the same
        assert pair.extra["place"] == rendered[1]
        assert pair.caption in {f"a {pair.word} {phrase}" for phrase in BY_NAME[rendered[1]].phrases}
        assert (pair.subject.size, pair.target.size) == ((128, 128), (96, 96))
        colours = [np.asarray(each)[int(0.55 * each.height), each.width // 2] for each in (pair.subject, pair.target)]
        assert np.abs(colours[0].astype(int) - colours[1]).max() <= 3  # the same shape in the same colour
        words.add(pair.word)
        backgrounds.add(pair.extra["place"])
    assert words == set(TRAINED)
    assert backgrounds == BY_NAME.keys()


@pytest.mark.parametrize(("alone", "size", "centre"), [(False, 0.72, (0.5, 0.54)), (True, 0.9, (0.5, 0.5))])
def test_the_input_stands_somewhere_and_the_target_always_in_the_same_box(folder, monkeypatch, alone, size, centre):
    monkeypatch.setattr(
        source, "render_background", lambda background, edge, rng: Image.new("RGB", (edge, edge), source.GREY)
    )
    world = World(folder, count=50, edge=64, alone=alone)
    corners = set()
    for index in range(20):
        pair = world.pair(index, 0)
        left, top, right, bottom = content_box(pair.target)
        assert max(right - left, bottom - top) == pytest.approx(size * 64, abs=2)
        assert ((left + right) / 128, (top + bottom) / 128) == pytest.approx(centre, abs=1.5 / 64)
        corners.add(content_box(pair.subject)[:2])
    assert len(corners) > 10


def content_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is not grey."""
    ys, xs = np.nonzero(np.abs(np.asarray(image).astype(int) - source.GREY).max(axis=2) > 8)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_a_subject_alone_stands_on_grey(folder):
    world = World(folder, count=50, edge=64, alone=True)
    for index in range(20):
        pair = world.pair(index, 0)
        assert np.abs(np.asarray(pair.target)[0].astype(int) - source.GREY).max() <= 8
        assert pair.caption == f"a {pair.word}"
        assert np.asarray(pair.subject).std(axis=(0, 1)).max() > 5  # it is somewhere else


def test_a_share_of_all_things_is_joined(folder, monkeypatch):
    halves = []
    monkeypatch.setattr(source, "join_halves", lambda *both: halves.append(both) or join_halves(*both))
    world = World(folder, count=300, edge=32)
    for index in range(300):
        world.pair(index, 0)
    assert len(halves) / 300 == pytest.approx(source.JOINED_SHARE, abs=0.08)


def test_the_splits_share_no_word_and_one_style_is_never_trained_on(folder):
    train, held_out = ([World(folder, split, 200, 32).pair(i, 1) for i in range(60)] for split in ("train", "held-out"))
    assert {pair.word for pair in train} == set(TRAINED)
    assert {pair.word for pair in held_out} == set(HELD_OUT)
    assert HELD_OUT_STYLE not in {pair.extra["style"] for pair in train}
    assert HELD_OUT_STYLE in {pair.extra["style"] for pair in held_out}


def test_a_world_becomes_shards(folder, tmp_path):
    world = World(folder, count=6, edge=32)
    assert prepare(world, tmp_path, seed=5).pairs == 6
    found = {pair.key: pair for pair in itertools.islice(iter(PairStream(tmp_path)), 6)}
    assert sorted(found) == [f"{index:08d}" for index in range(6)]
    for index in range(6):
        files = encode_pair(world.pair(index, 5))
        again = found[f"{index:08d}"]
        with Image.open(io.BytesIO(files["target.webp"])) as expected:
            assert np.array_equal(np.asarray(again.target), np.asarray(expected.convert("RGB")))


def test_pairs_of_other_artwork_are_refused(tmp_path):
    """A folder that was filled anew with more styles, under shards that were made of fewer."""
    folder = write_artwork(tmp_path / "artwork")
    world = World(folder, count=2, edge=32)
    prepare(world, tmp_path / "pairs", settings=world.settings)
    prepare(world, tmp_path / "pairs", settings=world.settings)
    shutil.copytree(folder / "noto", folder / "another")
    with pytest.raises(ValueError, match="was made with artwork '.+' instead of '.+': choose another folder"):
        prepare(world, tmp_path / "pairs", settings=world.settings)


@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), EOFError(), ValueError("no such frame")])
def test_whatever_pillow_raises_artwork_is_unreadable(tmp_path, monkeypatch, error):
    def opened(file):
        raise error

    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(OSError, match="noto/1f436.png"):
        open_artwork(tmp_path / "noto" / "1f436.png")


def test_artwork_that_cannot_be_read_is_skipped_and_counted(tmp_path):
    folder = write_artwork(tmp_path / "artwork")
    broken = {artwork.file for artwork in artwork_of_split(folder, "train")[::3]}
    for number, file in enumerate(sorted(broken)):
        whole = file.read_bytes()
        half = len(whole) // 2
        damaged = (b"", whole[:60], whole[:half] + bytes(len(whole) - half))  # nothing, truncated, garbled
        file.write_bytes(damaged[number % 3])
    prepared = prepare(World(folder, count=30, edge=32), tmp_path / "pairs", seed=5)
    assert list(prepared.skipped) == ["unreadable artwork"]
    assert prepared.pairs + prepared.skipped["unreadable artwork"] == 30
    assert prepared.pairs > 0
    listed = (tmp_path / "pairs" / "skipped.txt").read_text().splitlines()[1:]
    assert {line.split("\t")[2].split(":")[0] for line in listed} <= {f"{f.parent.name}/{f.name}" for f in broken}


def test_artwork_of_judges_and_reports_can_be_read(tmp_path, caplog):
    folder = write_artwork(tmp_path)
    whole = artwork_of_split(folder, "held-out")
    whole[1].file.write_bytes(b"")
    assert readable_artwork(folder, "held-out") == [whole[0], *whole[2:]]
    broken = whole[1].file
    assert f"Artwork is left out that cannot be read: {broken.parent.name}/{broken.name}" in caplog.text
