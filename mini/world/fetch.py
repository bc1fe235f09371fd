"""Fill an artwork folder from the npm registry: ``python -m mini artwork FOLDER``.

Seven sets that draw the same things, so that a word alone does not say what its thing looks like (REFERENCE 8). Three
are pictures, joined by code point; four are vector drawings in Iconify's format, joined by name and rendered here. Each
package is fetched at one version and held against its checksum.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import resvg_py

from blip_qformer.atomic import atomic_file

REGISTRY = "https://registry.npmjs.org"


LIST = "package/emoji.json"


DRAWINGS = "package/icons.json"


CODES_OF_NAMES = "package/chars.json"


RENDERED_EDGE = 128  # pixels


#: Flags and symbols are no things; skin tones repeat a person.
CATEGORIES = {
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Activities",
    "Travel & Places",
    "Smileys & Emotion",
    "People & Body",
}


#: One clock is enough; there is one for every half hour.
REPEATED = "CLOCK FACE"


@dataclass(frozen=True)
class Package:
    """One npm package: where its pictures lie inside it, and which style they are.

    Args:
        pictures: the folder of files named by code point; None: it is an icon set of Iconify's.
    """

    name: str
    version: str
    sha256: str
    style: str
    pictures: str | None = None

    @property
    def path(self) -> str:
        """Where it lies in a registry."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = (
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "noto",
        "package/img/google/64/",
    ),
    Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "twemoji",
        "package/img/twitter/64/",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "fluent",
        "package/assets/",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "fluent-flat",
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "noto-v1",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "emojione",
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "fxemoji",
    ),
)


def fill(folder: Path, packages: Sequence[Package] = PACKAGES, registry: str = REGISTRY) -> int:
    """Fetch every package into ``folder`` and list the things; returns how many pictures there are.

    Args:
        packages: the first of them has the list, ``emoji.json``; of the icon sets, the first tells most names.
        registry: npm's, or a mirror of it.

    Raises:
        OSError: the registry cannot be reached, or the disk is full.
        ValueError: what came is not what was asked for.
    """
    things: dict[str, dict[str, str]] = {}
    codes: dict[str, str] = {}
    pictures = 0
    for package in packages:
        with tarfile.open(fileobj=io.BytesIO(_fetch(f"{registry}/{package.path}", package.sha256))) as archive:
            if not things:
                things = _read_things(archive, package)
                codes = {_letters(thing["word"]): code for code, thing in things.items()}
            if package.pictures is None:
                pictures += _render(archive, folder / package.style, codes)
            else:
                pictures += _unpack(archive, package, folder / package.style, set(things))
    lines = [json.dumps({"code": code, **thing}, ensure_ascii=False) for code, thing in sorted(things.items())]
    with atomic_file(folder / "things.jsonl") as temporary:  # written last: it says that the folder is complete
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return pictures


def _fetch(url: str, sha256: str) -> bytes:
    with urllib.request.urlopen(url, timeout=120) as answer:
        content = answer.read()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{url} has the SHA-256 {found}, expected {sha256}: it is another file now, or not whole.")
    return content


def _read_things(archive: tarfile.TarFile, package: Package) -> dict[str, dict[str, str]]:
    if LIST not in archive.getnames():
        raise ValueError(f"{package.path} has no {LIST}, which names what is drawn: put one first that has.")
    entries = json.load(archive.extractfile(LIST))
    return {
        _code(entry["unified"]): {"word": _word(entry["name"]), "category": entry["category"]}
        for entry in entries
        if entry["category"] in CATEGORIES and not entry["name"].startswith(REPEATED)
    }


def _unpack(archive: tarfile.TarFile, package: Package, folder: Path, wanted: set[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for member in archive:
        file = Path(member.name)
        if member.isfile() and member.name == f"{package.pictures}{file.name}" and _code(file.stem) in wanted:
            (folder / f"{_code(file.stem)}{file.suffix}").write_bytes(archive.extractfile(member).read())
            count += 1
    return count


def _render(archive: tarfile.TarFile, folder: Path, codes: dict[str, str]) -> int:
    """Render the drawings of an icon set whose names are known.

    Args:
        codes: of names, in letters alone; what the set tells of its own names is added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = json.load(archive.extractfile(DRAWINGS))
    wanted = set(codes.values())
    if CODES_OF_NAMES in archive.getnames():
        own = json.load(archive.extractfile(CODES_OF_NAMES))
        codes |= {_letters(name): _code(code) for code, name in own.items() if _code(code) in wanted}
    files = {}
    for name, drawing in drawings["icons"].items():
        if code := codes.get(_letters(name)):
            files[folder / f"{code}.png"] = _svg(drawing, drawings)
    for file, svg in files.items():
        file.write_bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED_EDGE, skip_system_fonts=True))
    return len(files)


def _svg(drawing: dict[str, str | int], defaults: dict[str, int]) -> str:
    """A whole SVG of what Iconify keeps of one; sizes that a drawing does not tell are the set's."""
    box = [drawing.get(side, defaults.get(side, 0)) for side in ("left", "top", "width", "height")]
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{" ".join(map(str, box))}">{drawing["body"]}</svg>'


def _letters(name: str) -> str:
    """``hot-beverage`` and ``hot beverage`` -> ``hotbeverage``, as some sets write it."""
    return "".join(character for character in name.lower() if character.isalnum())


def _code(name: str) -> str:
    """Code points as every set can be joined by: lower case, without the variation selector that some leave out."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def _word(name: str) -> str:
    """``DOG FACE`` -> ``dog face``; what follows a comma or stands in brackets says too much."""
    return name.lower().split(",")[0].split("(")[0].replace("-", " ").replace("’", "").strip()
