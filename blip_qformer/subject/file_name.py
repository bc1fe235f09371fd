"""File names that are valid on every file system and in every prompt."""

from __future__ import annotations

import unicodedata

MAX_NAME_BYTES = 120  # with a suffix it fits every file system, encrypted ones included
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}
EXTRA_CHARACTERS = "-_."


def checked_name(name: str) -> str:
    """Check a name that a person wrote: letters and digits of any script, ``-``, ``_`` and ``.``.

    Such a name has no folder, no control character and nothing that ends a word in a prompt, and is the same file on
    Linux, macOS and Windows.

    Args:
        name: The name, without suffix.

    Returns:
        The name in Unicode's normal form C, as file systems differ in normalisation.

    Raises:
        ValueError: The name cannot be used; the message says why and suggests another.
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
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"The name {name[:20]!r}... is {len(name.encode())} bytes long, and {MAX_NAME_BYTES} fit every file "
            "system: shorten it."
        )
    return name


def _is_allowed(character: str) -> bool:
    """Return whether a character is a letter, a mark, a number (Unicode categories L, M, N) or one of ``-_.``."""
    return character in EXTRA_CHARACTERS or unicodedata.category(character)[0] in "LMN"


def _suggestion(name: str) -> str:
    """Return a valid name that resembles the given one."""
    kept = "".join(character if _is_allowed(character) else "_" for character in name)
    return kept.strip("._") or "my_subject"
