"""Find the files of a repository in the layout of the Hub's cache.

The layout (huggingface.co/docs/huggingface_hub, "Understand caching"): ``models--<owner>--<name>`` holds ``blobs``,
``refs/main`` with the name of a commit, and ``snapshots/<commit>`` with the files, as links to blobs.
"""

from __future__ import annotations

from pathlib import Path

REPOSITORY_PREFIX = "models--"


def snapshot_folder(path: Path) -> Path:
    """Return the folder that holds a repository's files.

    Args:
        path: A folder of the cache, ``models--<owner>--<name>`` or its ``snapshots``; or any other path.

    Returns:
        The snapshot that ``refs/main`` names, or the newest if that is not there. Any other path as it is.
    """
    repository = path.parent if path.name == "snapshots" else path
    snapshots = repository / "snapshots"
    is_cache = repository.name.startswith(REPOSITORY_PREFIX) or (repository / "refs").is_dir()
    commits = [folder for folder in snapshots.glob("*") if folder.is_dir()] if is_cache else []
    if not commits:
        return path
    main = repository / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text(encoding="utf-8").strip()) in commits:
        return named
    return max(commits, key=lambda folder: (folder.stat().st_mtime, folder.name))
