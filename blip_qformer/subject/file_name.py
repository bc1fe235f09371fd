"""Names for files that every file system and every prompt can hold."""

from __future__ import annotations

import unicodedata

LONGEST_NAME = 120  # bytes: with an ending it fits every file system, encrypted ones included
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}
EXTRA_CHARACTERS = "-_."


def checked_name(name: str) -> str:
    """A name a person wrote, if it is safe: letters and digits of any script, ``-``, ``_`` and ``.``.

    So it holds no folder, no control character, nothing that ends a word in a prompt, and is the same file on Linux,
    macOS and Windows.

    Returns:
        The name in one Unicode form, as file systems differ in it.

    Raises:
        ValueError: says what is wrong with the name.
    """
    name = unicodedata.normalize("NFC", name.strip())
    if not name:
        raise ValueError('The name is empty: write one, such as "my_dog".')
    strange = "".join(dict.fromkeys(character for character in name if not _is_allowed(character)))
    if strange:
        raise ValueError(
            f"The name {name!r} holds {strange!r}, but a name is made of letters, digits, -, _ and . only, without "
            f'folders and spaces: write "{_suggestion(name)}".'
        )
    if name.startswith(".") or name.endswith("."):
        raise ValueError(
            f'The name "{name}" begins or ends with a dot, which hides a file or is lost on some systems: write '
            f'"{_suggestion(name)}".'
        )
    # Windows takes COM¹ for COM1, and "con.v2" for a device as well.
    if unicodedata.normalize("NFKC", name).split(".")[0].upper() in RESERVED:
        raise ValueError(f'The name "{name}" belongs to a device on Windows: write "{_suggestion("my_" + name)}".')
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"The name {name[:20]!r}... is {len(name.encode())} bytes long, and {LONGEST_NAME} fit every file system: "
            "shorten it."
        )
    return name


def _is_allowed(character: str) -> bool:
    """Letters, the marks on them, numbers; Unicode files them under L, M and N."""
    return character in EXTRA_CHARACTERS or unicodedata.category(character)[0] in "LMN"


def _suggestion(name: str) -> str:
    kept = "".join(character if _is_allowed(character) else "_" for character in name)
    return kept.strip("._") or "my_subject"
