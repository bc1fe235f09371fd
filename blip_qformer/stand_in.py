"""Tell what a download can leave in the place of a file: a git-lfs pointer or a web page."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

NAMED = 3  # so many files are named in a sentence, and the rest is counted
HEAD_SIZE = 1024  # bytes that are enough to tell

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # github.com/git-lfs/git-lfs, docs/spec.md
# <Error> is what storage servers answer in XML. An SVG, which begins with <?xml too, is a file of its own right.
_WEB_PAGE = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|error)\b", re.I | re.S
)


class StandIn(Enum):
    """What is there instead of a file; the values follow the names of one file and of several."""

    LFS_POINTER = (
        "is a git-lfs pointer, a small text in place of the file itself: run git lfs pull in its folder, or download "
        "the file with hf download.",
        "are git-lfs pointers, small texts in place of the files themselves: run git lfs pull in this folder, or "
        "download the files with hf download.",
    )
    WEB_PAGE = (
        "is a web page that was saved in place of the file itself: download the file with the download button beside "
        "its name, or with hf download.",
        "are web pages that were saved in place of the files themselves: download each file with the download button "
        "beside its name, or all with hf download.",
    )

    def sentence(self, paths: Sequence[Path]) -> str:
        """Say in one sentence what files are, and what to do.

        Args:
            paths: The files, at least one.
        """
        one, several = self.value
        if len(paths) == 1:
            return f"{paths[0]} {one}"
        folder = Path(os.path.commonpath([path.parent for path in paths]))
        names = [path.relative_to(folder).as_posix() for path in paths]
        rest = [f"{len(names) - NAMED} more"] if len(names) > NAMED else [names.pop()]
        return f"{folder}: {', '.join(names[:NAMED])} and {rest[0]} {several}"


def stand_in(path: Path) -> StandIn | None:
    """Return what a file is instead of its content, or None if it is neither a git-lfs pointer nor a web page.

    Args:
        path: The file. One that is missing or cannot be opened gives None.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_SIZE)
    except OSError:
        return None
    if head.startswith(_LFS_POINTER):
        return StandIn.LFS_POINTER
    return StandIn.WEB_PAGE if _WEB_PAGE.match(head) else None


def stand_in_sentences(paths: Iterable[Path]) -> list[str]:
    """Return a sentence for the git-lfs pointers among files, and one for the web pages.

    Args:
        paths: The files, of any content.
    """
    found: dict[StandIn, list[Path]] = {}
    for path in paths:
        if kind := stand_in(path):
            found.setdefault(kind, []).append(path)
    return [kind.sentence(files) for kind, files in found.items()]
