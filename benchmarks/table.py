"""Print results as Markdown, and keep them in ``RESULTS.md``."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import Comparison
from blip_qformer.atomic import atomic_file

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# Results\n\nWritten by the commands in the headings, never by hand.\n"


@dataclass(frozen=True)
class Row:
    """One comparison as a row of a table.

    Attributes:
        what: Name of what was timed.
        peer: Name of what it was compared with.
        comparison: Measured times.
        aim: Ratio to reach.
    """

    what: str
    peer: str
    comparison: Comparison
    aim: str

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells, in the order of :data:`HEAD`."""
        comparison = self.comparison
        return (
            self.what,
            self.peer,
            f"{statistics.median(comparison.ours):.3g}",
            f"{statistics.median(comparison.peer):.3g}",
            f"**{comparison.ratio:.2f}** ({min(comparison.ratios):.2f}..{max(comparison.ratios):.2f})",
            f"{comparison.ratio_of_fastest:.2f}",
            self.aim,
        )


HEAD = ("what", "peer", "ours, s", "peer, s", "ratio: median (min..max)", "of the fastest runs", "aim")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine() -> str:
    """Describe in one line where and when this was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{device}, {threads} threads, {versions}, {datetime.date.today()}"


def write_section(command: str, text: str, results: Path = RESULTS) -> None:
    """Replace or append the section of the results whose heading is a command."""
    content = results.read_text(encoding="utf-8") if results.exists() else TITLE
    heading = f"## `{command}`"
    sections = [each for each in re.split(r"(?m)^(?=## )", content) if each.splitlines()[0] != heading]
    sections.append(f"{heading}\n\n{text}\n")
    with atomic_file(results) as temporary:
        temporary.write_text("\n\n".join(section.strip() for section in sections) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
