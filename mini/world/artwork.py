"""The artwork folder: every thing in every style, and who may be trained on.

A folder holds ``things.jsonl``, for each thing a line
``{"code": "1f436", "word": "dog face", "category": "Animals & Nature"}``, and for each style that draws it
``<style>/<code>.png`` or ``.webp`` with a transparent background.
``python -m mini artwork`` fills one from the npm registry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: The style that is never trained on.
HELD_OUT_STYLE = "twemoji"


#: The part of all words that is never trained on.
HELD_OUT_WORDS = 0.2


#: Parts of many names, which make no two things alike.
COMMON_PARTS = frozenset(
    [
        "a",
        "and",
        "closed",
        "down",
        "eyes",
        "face",
        "for",
        "hand",
        "hands",
        "in",
        "left",
        "man",
        "of",
        "on",
        "open",
        "person",
        "right",
        "sign",
        "symbol",
        "the",
        "up",
        "with",
        "woman",
    ]
)


#: Categories whose pictures are things; the rest (faces, people) is only trained on.
THINGS = frozenset({"Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places"})


LISTING = "things.jsonl"


PICTURE_SUFFIXES = (".png", ".webp")


@dataclass(frozen=True)
class Artwork:
    """One thing drawn in one style."""

    code: str
    word: str
    category: str
    style: str
    file: Path


def read_artwork(folder: Path) -> list[Artwork]:
    """All artwork in a folder, in an order that does not depend on the file system.

    Raises:
        FileNotFoundError: there is no ``things.jsonl``, or no picture beside it.
        ValueError: a line of it is not what it should be.
    """
    listing = folder / LISTING
    if not listing.is_file():
        raise FileNotFoundError(f"No {LISTING} is in '{folder}': fill it with 'python -m mini artwork {folder}'.")
    lines = enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1)
    things = [_read_thing(line, f"Line {number} of '{listing}'") for number, line in lines if line]
    styles = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    found = [
        Artwork(code, word, category, style, file)
        for code, word, category in things
        for style in styles
        for file in [(folder / style / code).with_suffix(suffix) for suffix in PICTURE_SUFFIXES]
        if file.is_file()
    ]
    if not found:
        raise FileNotFoundError(f"'{folder}' lists {len(things)} things and holds a picture of none: fill it anew.")
    return found


def _read_thing(line: str, place: str) -> tuple[str, str, str]:
    """Code, word and category of one line."""
    try:
        thing = json.loads(line)
        code, word, category = (thing[name] for name in ("code", "word", "category"))
        if not word.split():
            raise ValueError("its word is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is no thing ({error!r}): fill the folder anew.") from error
    return code, word, category


def is_held_out_word(word: str) -> bool:
    """Whether a word is never trained on: a fixed fifth of all words, drawn by the word's own hash.

    "dog" and "dog face" go together, or the one would be trained on as the other: what counts is the first word.
    """
    first = word.split()[0]
    return int(hashlib.sha256(first.encode()).hexdigest(), 16) % 1000 < HELD_OUT_WORDS * 1000


def trained_on(artwork: Sequence[Artwork]) -> list[Artwork]:
    """What a model may see: nothing held out, nor what shares a part of its name with it.

    An open lock is drawn like a lock, and a tropical fish like a fish.
    """
    held_out = {part for each in artwork if is_held_out_word(each.word) for part in _telling_parts(each.word)}
    return [each for each in artwork if each.style != HELD_OUT_STYLE and held_out.isdisjoint(_telling_parts(each.word))]


def held_out_things(artwork: Sequence[Artwork]) -> list[Artwork]:
    """What models are judged by: things whose word was never trained on, in any style."""
    return [each for each in artwork if each.category in THINGS and is_held_out_word(each.word)]


def _telling_parts(word: str) -> set[str]:
    return set(word.split()) - COMMON_PARTS or {word}


#: The splits by name; what :class:`~mini.world.source.World` takes.
SPLITS: dict[str, Callable[[Sequence[Artwork]], list[Artwork]]] = {"train": trained_on, "held-out": held_out_things}
