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
from dataclasses import dataclass
from pathlib import Path

REGISTRY = "https://registry.npmjs.org"

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
    def url(self) -> str:
        return f"{REGISTRY}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = (
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "noto",
        "package/img/google/64/",
    ),
    Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "twemoji",
        "package/img/twitter/64/",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "fluent",
        "package/assets/",
    ),
)


def fill(folder: Path) -> int:
    """Fetch every package into ``folder`` and list the things; returns how many pictures there are.

    Raises:
        OSError: the registry cannot be reached, or the disk is full.
        ValueError: what came is not what was asked for.
    """
    things: dict[str, dict[str, str]] = {}
    pictures = 0
    for package in PACKAGES:
        with tarfile.open(fileobj=io.BytesIO(_fetch(package))) as archive:
            if not things:
                things = _read_things(archive)
            pictures += _unpack(archive, package, folder / package.style, set(things))
    lines = [json.dumps({"code": code, **thing}, ensure_ascii=False) for code, thing in sorted(things.items())]
    (folder / "things.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return pictures


def _fetch(package: Package) -> bytes:
    with urllib.request.urlopen(package.url, timeout=120) as answer:
        content = answer.read()
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{package.url} has the SHA-256 {found}, expected {package.sha256}: it is another file now.")
    return content


def _read_things(archive: tarfile.TarFile) -> dict[str, dict[str, str]]:
    entries = json.load(archive.extractfile("package/emoji.json"))
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.artwork", description="Fill an artwork folder.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        print(f"{fill(folder)} pictures in {folder}")
    except (OSError, ValueError, tarfile.TarError) as problem:
        print(f"The artwork could not be fetched: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
