"""Fill an artwork folder from the npm registry: ``python -m tools.artwork FOLDER``.

Three sets that draw the same things, joined by code point (REFERENCE 8): Noto Emoji (Apache-2.0), Fluent Emoji (MIT)
and Twemoji (CC-BY 4.0). Each package is fetched at one version and held against its checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

REGISTRY = "https://registry.npmjs.org"

LIST = "package/emoji.json"

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
    """One npm package: where its pictures lie inside it, and which style they are."""

    name: str
    version: str
    sha256: str
    style: str
    pictures: str

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
)


def fill(folder: Path, packages: Sequence[Package] = PACKAGES, registry: str = REGISTRY) -> int:
    """Fetch every package into ``folder`` and list the things; returns how many pictures there are.

    Args:
        packages: the first of them has the list, ``emoji.json``.
        registry: npm's, or a mirror of it.
    Raises:
        OSError: the registry cannot be reached, or the disk is full.
        ValueError: what came is not what was asked for.
    """
    things: dict[str, dict[str, str]] = {}
    pictures = 0
    for package in packages:
        with tarfile.open(fileobj=io.BytesIO(_fetch(f"{registry}/{package.path}", package.sha256))) as archive:
            if not things:
                things = _read_things(archive, package)
            pictures += _unpack(archive, package, folder / package.style, set(things))
    lines = [json.dumps({"code": code, **thing}, ensure_ascii=False) for code, thing in sorted(things.items())]
    (folder / "things.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
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


def _code(name: str) -> str:
    """Code points as every set can be joined by: lower case, without the variation selector that some leave out."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def _word(name: str) -> str:
    """``DOG FACE`` -> ``dog face``; what follows a comma or stands in brackets says too much."""
    return name.lower().split(",")[0].split("(")[0].replace("-", " ").replace("’", "").strip()


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 1 with one line on stderr if the artwork could not be fetched."""
    parser = argparse.ArgumentParser(prog="python -m tools.artwork", description="Fill an artwork folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--registry", default=REGISTRY, help=f"npm's registry, or a mirror of it ({REGISTRY})")
    arguments = parser.parse_args(argv)
    try:
        print(f"{fill(arguments.folder, registry=arguments.registry)} pictures in {arguments.folder}")
    except (OSError, HTTPException, ValueError, tarfile.TarError) as problem:
        print(f"The artwork could not be fetched: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
