"""The artwork folder: what is read of it, who may be trained on, and how it is fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest
from PIL import Image

from mini.world.artwork import HELD_OUT_STYLE, SPLITS, Artwork, is_held_out_word, read_artwork
from mini.world.fetch import PACKAGES, Package, fill
from mini.world.source import artwork_of_split
from tests.artwork import HELD_OUT, STYLES, TRAINED, write_artwork


def test_every_thing_is_there_in_every_style(tmp_path):
    found = read_artwork(write_artwork(tmp_path))
    assert {(artwork.word, artwork.style) for artwork in found} == {
        (word, style) for word in TRAINED + HELD_OUT for style in STYLES
    }
    assert all(artwork.file.is_file() and artwork.category == "Objects" for artwork in found)
    assert [artwork.style for artwork in found] == list(STYLES) * 10  # thing by thing, each in the order of styles


def test_what_a_style_does_not_hold_is_left_out_and_webp_is_read(tmp_path):
    write_artwork(tmp_path)
    files = sorted((tmp_path / "noto").iterdir())
    files[0].unlink()
    files[1].rename(files[1].with_suffix(".webp"))
    noto = [artwork for artwork in read_artwork(tmp_path) if artwork.style == "noto"]
    assert [artwork.file.suffix for artwork in noto] == [".webp"] + 8 * [".png"]


def test_nothing_of_one_split_is_in_another(tmp_path):
    folder = write_artwork(tmp_path)
    train, held_out = (artwork_of_split(folder, split) for split in ("train", "held-out"))
    assert {artwork.word for artwork in train} == set(TRAINED)
    assert {artwork.word for artwork in held_out} == set(HELD_OUT)
    assert {artwork.style for artwork in train} == set(STYLES) - {HELD_OUT_STYLE}
    assert {artwork.style for artwork in held_out} == set(STYLES)


def test_a_fifth_of_all_words_is_held_out_and_relatives_go_together():
    words = [f"word{number}" for number in range(5000)]
    assert sum(map(is_held_out_word, words)) / len(words) == pytest.approx(0.2, abs=0.02)
    for word in words[:100]:
        assert is_held_out_word(word) == is_held_out_word(f"{word} face")


def test_people_are_no_things_to_be_judged_by():
    thing, person = (artwork_of(HELD_OUT[0], category) for category in ("Objects", "People & Body"))
    assert SPLITS["held-out"]([thing, person]) == [thing]
    assert SPLITS["train"]([thing, person]) == []


def test_what_shares_a_part_of_its_name_with_a_held_out_thing_is_not_trained_on():
    related, other = artwork_of(f"{TRAINED[0]} {HELD_OUT[0]}"), artwork_of(f"{TRAINED[0]} face")
    assert SPLITS["train"]([artwork_of(HELD_OUT[0]), related, other]) == [other]
    assert SPLITS["train"]([artwork_of(f"{HELD_OUT[0]} face"), related, other]) == [other]  # "face" tells nothing


def artwork_of(word: str, category: str = "Objects") -> Artwork:
    return Artwork("1", word, category, "noto", Path())


def test_a_folder_that_is_not_whole_gets_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="No things.jsonl is in .* fill it with 'python -m mini artwork"):
        read_artwork(tmp_path)
    (tmp_path / "things.jsonl").write_text('{"code": "1f436", "word": "dog", "category": "Objects"}\n')
    with pytest.raises(FileNotFoundError, match="lists 1 things and holds a picture of none: fill it anew"):
        read_artwork(tmp_path)
    for damage in ("half a li", "{}", "[]", '{"code": "1", "word": " ", "category": "Objects"}'):
        (tmp_path / "things.jsonl").write_text(f'{{"code": "1", "word": "dog", "category": "Objects"}}\n\n{damage}\n')
        with pytest.raises(ValueError, match="^Line 3 of .*things.jsonl' is no thing .*: fill the folder anew.$"):
            read_artwork(tmp_path)
    with pytest.raises(ValueError, match='"test" is no split of the world: choose one of train, held-out'):
        artwork_of_split(tmp_path, "test")


ENTRIES = [
    {"unified": "1F436", "name": "DOG FACE", "category": "Animals & Nature"},
    {"unified": "2615-FE0F", "name": "HOT BEVERAGE, STEAMING (CUP)", "category": "Food & Drink"},
    {"unified": "1F3C1", "name": "CHEQUERED FLAG", "category": "Flags"},
    {"unified": "1F550", "name": "CLOCK FACE ONE OCLOCK", "category": "Travel & Places"},
]


def archive_of(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def image(colour: tuple[int, int, int, int], kind: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGBA", (8, 8), colour).save(content, kind)
    return content.getvalue()


@contextlib.contextmanager
def registry(files: dict[str, bytes]):
    """What answers like npm's, on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path.lstrip("/"))
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def packages():
    """Two packages and what a registry holds of them: a set with a list, and one that writes code points otherwise."""
    dog, cup = image((200, 0, 0, 255), "PNG"), image((0, 0, 200, 255), "WEBP")
    first = archive_of(
        {
            "package/emoji.json": json.dumps(ENTRIES).encode(),
            "package/img/noto/64/1f436.png": dog,
            "package/img/noto/64/2615-fe0f.png": dog,
            "package/img/noto/64/1f3c1.png": dog,
            "package/img/noto/64/1f550.png": dog,
            "package/img/noto/32/1f436.png": cup,
            "package/img/noto/64/../../../../1f436.png": cup,
        }
    )
    second = archive_of({"package/assets/2615.webp": cup, "package/assets/1f9ff.webp": cup, "package/readme": b""})
    made = (
        Package("emoji-noto", "16.0.0", hashlib.sha256(first).hexdigest(), "noto", "package/img/noto/64/"),
        Package("@some/fluent", "1.1.0", hashlib.sha256(second).hexdigest(), "fluent", "package/assets/"),
    )
    return made, {"emoji-noto/-/emoji-noto-16.0.0.tgz": first, "@some/fluent/-/fluent-1.1.0.tgz": second}


def test_a_folder_is_filled_from_a_registry(packages, tmp_path):
    made, files = packages
    with registry(files) as url:
        assert fill(tmp_path, made, url) == 3
    found = {(artwork.word, artwork.style): artwork for artwork in read_artwork(tmp_path)}
    assert found.keys() == {("dog face", "noto"), ("hot beverage", "noto"), ("hot beverage", "fluent")}
    assert found["dog face", "noto"].code == "1f436"
    assert found["hot beverage", "fluent"].file == tmp_path / "fluent" / "2615.webp"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fluent", "noto", "things.jsonl"]
    with Image.open(found["dog face", "noto"].file) as opened:
        assert opened.getpixel((0, 0)) == (200, 0, 0, 255)


def icon_set(name: str, icons: dict[str, dict], **files: dict) -> tuple[Package, dict[str, bytes]]:
    """An icon set of Iconify's, 16 units square, and what a registry holds of it."""
    content = {"icons": icons, "width": 16, "height": 16}
    files = {"icons.json": content, **{f"{file}.json": each for file, each in files.items()}}
    archive = archive_of({f"package/{file}": json.dumps(each).encode() for file, each in files.items()})
    package = Package(f"@iconify-json/{name}", "1.0.0", hashlib.sha256(archive).hexdigest(), name)
    return package, {f"@iconify-json/{name}/-/{name}-1.0.0.tgz": archive}


def test_icons_are_matched_by_name_and_rendered(packages, tmp_path):
    made, files = packages
    left_half = '<rect width="{0}" height="{1}" fill="#f00"/>'
    named, its_files = icon_set(
        "flat",
        {
            "dog-face": {"body": left_half.format(8, 16)},
            "hot-drink": {"body": left_half.format(8, 8), "height": 8},
            "moon": {"body": "<path/>"},
        },
        chars={"2615-fe0f": "hot-drink", "1f319": "moon"},
    )
    plain, other_files = icon_set(
        "plain", {"hotdrink": {"body": left_half.format(20, 2), "left": 4, "width": 8}, "unheard-of": {"body": "<g/>"}}
    )
    with registry(files | its_files | other_files) as url:
        assert fill(tmp_path, (*made, named, plain), url) == 3 + 2 + 1
    found = {(artwork.word, artwork.style): artwork for artwork in read_artwork(tmp_path)}
    assert {style for _, style in found} == {"noto", "fluent", "flat", "plain"}
    with Image.open(found["dog face", "flat"].file) as dog, Image.open(found["hot beverage", "flat"].file) as cup:
        assert dog.size == (128, 128)
        assert dog.getpixel((30, 100)) == (255, 0, 0, 255)
        assert dog.getpixel((100, 100))[3] == 0
        assert cup.size == (128, 64)
    with Image.open(found["hot beverage", "plain"].file) as cup:  # by the name that the other set told
        assert cup.size == (128, 256)
        assert cup.getpixel((127, 20)) == (255, 0, 0, 255)


def test_another_file_than_expected_is_refused(packages, tmp_path):
    made, files = packages
    for name in files:
        damaged = {**files, name: files[name] + b"more"}
        with (
            registry(damaged) as url,
            pytest.raises(ValueError, match=f"{name} has the SHA-256 .*, expected .*: it is an"),
        ):
            fill(tmp_path, made, url)
        assert not (tmp_path / "things.jsonl").exists()  # what is not listed is not read


def test_a_set_without_a_list_is_refused(packages, tmp_path):
    made, files = packages
    first = dataclasses.replace(made[1], style="noto")
    with registry(files) as url, pytest.raises(ValueError, match="fluent-1.1.0.tgz has no package/emoji.json"):
        fill(tmp_path, [first], url)


def test_the_packages_are_told_by_their_checksums():
    assert {package.style for package in PACKAGES} == {
        *("noto", "twemoji", "fluent"),
        *("fluent-flat", "noto-v1", "emojione", "fxemoji"),
    }
    for package in PACKAGES:
        assert len(bytes.fromhex(package.sha256)) == 32
