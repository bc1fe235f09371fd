"""Fill an artwork folder from the npm registry: ``python -m mini artwork FOLDER``.

Seven emoji sets show the same things, so that a word alone does not tell what its thing looks like. Three hold images,
matched by code point; four hold vector graphics in Iconify's format, matched by name and rendered here. Each package is
fetched at one version and compared with its checksum.
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
from typing import Any

import resvg_py

from blip_qformer.atomic import atomic_file

REGISTRY = "https://registry.npmjs.org"
LISTING_MEMBER = "package/emoji.json"
ICONS_MEMBER = "package/icons.json"
NAMES_MEMBER = "package/chars.json"  # code points of an icon set's own names

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
    """An emoji set as an npm package.

    Args:
        name: The package's name, with its scope.
        version: The package's version.
        sha256: Checksum of the archive.
        style: The folder in which its images are put.
        images: Folder in the archive with files named by code point; None for an icon set in Iconify's format.
    """

    name: str
    version: str
    sha256: str
    style: str
    images: str | None = None

    @property
    def path(self) -> str:
        """Path of the archive in a registry."""
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
    """Fetch every package into a folder and list the things.

    Args:
        folder: The folder to fill, made if missing.
        packages: Packages; the first has the listing ``emoji.json``, and of the icon sets the first tells most names.
        registry: URL of npm's registry, or of a mirror.

    Returns:
        The number of images.

    Raises:
        OSError: The registry cannot be reached, or the disk is full.
        ValueError: A package is not what was asked for.
    """
    things: dict[str, dict[str, str]] = {}
    codes: dict[str, str] = {}
    count = 0
    for package in packages:
        with tarfile.open(fileobj=io.BytesIO(_fetch(f"{registry}/{package.path}", package.sha256))) as archive:
            if not things:
                things = _read_things(archive, package)
                codes = {_letters(thing["word"]): code for code, thing in things.items()}
            if package.images is None:
                count += _render(archive, folder / package.style, codes)
            else:
                count += _unpack(archive, package, folder / package.style, set(things))
    lines = [json.dumps({"code": code, **thing}, ensure_ascii=False) for code, thing in sorted(things.items())]
    with atomic_file(folder / "things.jsonl") as temporary:  # written last: it says that the folder is complete
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return count


def _fetch(url: str, sha256: str) -> bytes:
    with urllib.request.urlopen(url, timeout=120) as response:
        content = response.read()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{url} has the SHA-256 {found}, expected {sha256}: it is another file now, or not whole.")
    return content


def _read_things(archive: tarfile.TarFile, package: Package) -> dict[str, dict[str, str]]:
    if LISTING_MEMBER not in archive.getnames():
        raise ValueError(f"{package.path} has no {LISTING_MEMBER}, which names what is drawn: put one first that has.")
    entries = _read_json(archive, LISTING_MEMBER)
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
        if member.isfile() and member.name == f"{package.images}{file.name}" and _code(file.stem) in wanted:
            (folder / f"{_code(file.stem)}{file.suffix}").write_bytes(_read_bytes(archive, member))
            count += 1
    return count


def _render(archive: tarfile.TarFile, folder: Path, codes: dict[str, str]) -> int:
    """Render the icons of a set whose names are known.

    Args:
        archive: The set's archive.
        folder: Where the images are put.
        codes: Code points by name, in letters alone; names that the set itself tells are added.

    Returns:
        The number of images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    icons = _read_json(archive, ICONS_MEMBER)
    wanted = set(codes.values())
    if NAMES_MEMBER in archive.getnames():
        own = _read_json(archive, NAMES_MEMBER)
        codes |= {_letters(name): _code(code) for code, name in own.items() if _code(code) in wanted}
    files = {}
    for name, icon in icons["icons"].items():
        if code := codes.get(_letters(name)):
            files[folder / f"{code}.png"] = _svg(icon, icons)
    for file, svg in files.items():
        file.write_bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED_EDGE, skip_system_fonts=True))
    return len(files)


def _svg(icon: dict[str, str | int], defaults: dict[str, int]) -> str:
    """Complete an icon to an SVG file; sizes that it does not tell are the set's."""
    box = [icon.get(side, defaults.get(side, 0)) for side in ("left", "top", "width", "height")]
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'


def _read_json(archive: tarfile.TarFile, member: str) -> Any:
    return json.loads(_read_bytes(archive, member))


def _read_bytes(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member  # only a folder has no content
    return file.read()


def _letters(name: str) -> str:
    """Reduce ``hot-beverage`` and ``hot beverage`` to ``hotbeverage``, as some sets write it."""
    return "".join(character for character in name.lower() if character.isalnum())


def _code(name: str) -> str:
    """Write code points in lower case, without the variation selector that some sets leave out."""
    return "-".join(point for point in name.lower().split("-") if point != "fe0f")


def _word(name: str) -> str:
    """Turn ``DOG FACE`` into ``dog face``, without what follows a comma or is in brackets."""
    return name.lower().split(",")[0].split("(")[0].replace("-", " ").replace("’", "").strip()
