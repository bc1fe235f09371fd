"""What commands print: sizes, tables, and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager


def format_bytes(count: int) -> str:
    """Format a number of bytes with three digits: ``3.44 GB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


def format_table(rows: Sequence[Sequence[str]], right_aligned: Collection[str] = ()) -> str:
    """Align rows of cells in columns.

    Args:
        rows: The rows, the first being the header; all of one length.
        right_aligned: Headers of the columns that are aligned to the right.

    Returns:
        One line per row, columns two spaces apart.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(rows[0], row, widths, strict=True)
        aligned = [cell.rjust(width) if head in right_aligned else cell.ljust(width) for head, cell, width in cells]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show progress on stderr while bytes are written.

    Args:
        title: The text before the bar.
        total: The number of bytes that will be written.

    Yields:
        A function to be called with each number of bytes written. It moves a bar, or prints a line for every tenth
        if tqdm is not installed.
    """
    try:
        from tqdm import tqdm  # not every host has it
    except ImportError:
        yield _progress_lines(title, total)
    else:
        with tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar:
            yield bar.update


def _progress_lines(title: str, total: int) -> Callable[[int], object]:
    done = tenths = 0

    def update(written: int) -> None:
        nonlocal done, tenths
        done += written
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            print(f"{title}: {format_bytes(done)} of {format_bytes(total)}", file=sys.stderr)

    return update
