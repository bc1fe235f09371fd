"""The artwork folder: every thing in every style, and which of it may be trained on.

A folder holds ``things.jsonl``, with a line
``{"code": "1f436", "word": "dog face", "category": "Animals & Nature"}`` for each thing, and for each style that has
the thing ``<style>/<code>.png`` or ``.webp`` with a transparent background.
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

#: The share of all words that is never trained on.
HELD_OUT_SHARE = 0.2

#: Words in many names, which make no two things alike.
# fmt: off
COMMON_WORDS = frozenset({
    "a", "and", "closed", "down", "eyes", "face", "for", "hand", "hands", "in", "left", "man", "of", "on", "open",
    "person", "right", "sign", "symbol", "the", "up", "with", "woman",
})
# fmt: on

#: Categories whose artwork shows things; the rest (faces, people) is only trained on.
THINGS = frozenset({"Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places"})

LISTING = "things.jsonl"
IMAGE_SUFFIXES = (".png", ".webp")


@dataclass(frozen=True)
class Artwork:
    """One thing in one style.

    Args:
        code: Code points of the emoji, such as ``1f436``.
        word: What it shows.
        category: Unicode's category.
        style: The style's folder.
        file: The image.
    """

    code: str
    word: str
    category: str
    style: str
    file: Path


def read_artwork(folder: Path) -> list[Artwork]:
    """List all artwork in a folder, in an order that does not depend on the file system.

    Args:
        folder: An artwork folder.

    Returns:
        The artwork, thing by thing, each in the order of the styles' names.

    Raises:
        FileNotFoundError: There is no ``things.jsonl``, or no image beside it.
        ValueError: A line of it is not what it should be.
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
        for file in [(folder / style / code).with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
        if file.is_file()
    ]
    if not found:
        raise FileNotFoundError(f"'{folder}' lists {len(things)} things and holds a picture of none: fill it anew.")
    return found


def _read_thing(line: str, origin: str) -> tuple[str, str, str]:
    """Read code, word and category from one line; ``origin`` says in an error which line it is."""
    try:
        thing = json.loads(line)
        code, word, category = (thing[name] for name in ("code", "word", "category"))
        if not word.split():
            raise ValueError("its word is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{origin} is no thing ({error!r}): fill the folder anew.") from error
    return code, word, category


def is_held_out_word(word: str) -> bool:
    """Say whether a word is never trained on: a fixed fifth of all words, chosen by the word's own hash.

    "dog" and "dog face" go together, or the one would be trained on as the other: only the first word counts.

    Args:
        word: A thing's word, or several words.

    Returns:
        True if it is held out.
    """
    first = word.split()[0]
    return int(hashlib.sha256(first.encode()).hexdigest(), 16) % 1000 < HELD_OUT_SHARE * 1000


def training_artwork(artwork: Sequence[Artwork]) -> list[Artwork]:
    """Choose what a model may be trained on: nothing held out, nor what shares a distinctive word with it.

    An open lock looks like a lock, and a tropical fish like a fish.

    Args:
        artwork: All artwork of a folder.

    Returns:
        The artwork to train on.
    """
    held_out = {word for each in artwork if is_held_out_word(each.word) for word in _distinctive_words(each.word)}
    return [
        each for each in artwork if each.style != HELD_OUT_STYLE and held_out.isdisjoint(_distinctive_words(each.word))
    ]


def held_out_artwork(artwork: Sequence[Artwork]) -> list[Artwork]:
    """Choose what models are evaluated on: things whose word was never trained on, in any style.

    Args:
        artwork: All artwork of a folder.

    Returns:
        The artwork to evaluate on.
    """
    return [each for each in artwork if each.category in THINGS and is_held_out_word(each.word)]


def _distinctive_words(name: str) -> set[str]:
    return set(name.split()) - COMMON_WORDS or {name}


#: The splits by name, for :class:`~mini.world.source.World`.
SPLITS: dict[str, Callable[[Sequence[Artwork]], list[Artwork]]] = {
    "train": training_artwork,
    "held-out": held_out_artwork,
}
