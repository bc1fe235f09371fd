"""Run the tests that depend on the host on several ComfyUIs, and print what each makes of them.

``make hosts HOSTS="dir dir"`` calls this. Each host gets an environment of its own with its own requirements, which is
kept for the next time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from tools.host import ROOT
from tools.host_versions import read_version

#: Nodes, workflows and frontend; everything else never meets the host.
TESTS = (
    "tests/nodes",
    "tests/test_first_minutes.py",
    "tests/test_host.py",
    "tests/test_workflow.py",
    "tests/test_workflows.py",
)

#: The ComfyUI that `make env` unpacks by itself, and the environments of all others.
UNPACKED, ENVIRONMENTS = ROOT / ".host" / "ComfyUI", ROOT / ".venvs"

IN_TWO_PROCESSES = ("--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder")


@dataclass(frozen=True)
class Outcome:
    """What the tests said on one host.

    Attributes:
        version: Version of the host.
        passed: Number of tests that passed.
        skipped: For each test that was skipped, why.
        failed: Names of the tests that failed.
    """

    version: str
    passed: int
    skipped: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def is_green(self) -> bool:
        """Whether tests ran and none failed."""
        return self.passed > 0 and not self.failed


def run_on_host(comfyui: Path, arguments: Sequence[str] = ()) -> Outcome:
    """Make the environment of a host if there is none, and run the tests on it.

    Args:
        comfyui: Folder of the host.
        arguments: Further arguments for pytest.

    Raises:
        ValueError: The folder holds no ComfyUI.
        subprocess.CalledProcessError: Its environment could not be made.
    """
    version = read_version(comfyui)
    is_unpacked = comfyui.resolve() == UNPACKED.resolve()
    environment = ROOT / ".venv" if is_unpacked else ENVIRONMENTS / version
    chosen = "" if is_unpacked else str(comfyui.resolve())
    subprocess.run(["make", "env", f"VENV={environment}", f"COMFYUI_PATH={chosen}"], cwd=ROOT, check=True)
    report = ROOT / "output" / "hosts" / f"{version}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    python = environment / "bin" / "python"
    command = [str(python), "-m", "pytest", *TESTS, *IN_TWO_PROCESSES, f"--junitxml={report}", *arguments]
    subprocess.run(["env", f"COMFYUI_PATH={chosen}", *command], cwd=ROOT, check=False)
    return read_outcome(version, report)


def read_outcome(version: str, report: Path) -> Outcome:
    """Count what a run of pytest reported.

    Args:
        version: Version of the host that it ran on.
        report: File that pytest wrote with ``--junitxml``; it is missing where pytest ended before any test.
    """
    if not report.is_file():
        return Outcome(version, 0, (), ("pytest did not run",))
    passed, skipped, failed = 0, [], []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif (reason := case.find("skipped")) is not None:
            skipped.append(reason.get("message", "no reason given"))
        else:
            passed += 1
    return Outcome(version, passed, tuple(skipped), tuple(failed))


def table(outcomes: Sequence[Outcome], day: date) -> str:
    """Write outcomes as a table in Markdown, the form of docs/hosts.md.

    Args:
        outcomes: An outcome for each host.
        day: Day of the run.
    """
    rows = [
        f"| {each.version} | {day} | {each.passed} | {len(each.skipped)} | {len(each.failed)} |" for each in outcomes
    ]
    return "\n".join(["| ComfyUI | tried on | passed | skipped | failed |", "|---|---|---|---|---|", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Its arguments; None for those of the process.

    Returns:
        The exit code: 1 where a host is not green.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hosts", nargs="+", type=Path, help="folders of ComfyUIs, each with main.py")
    options, pytest_arguments = parser.parse_known_args(arguments)
    outcomes = [run_on_host(comfyui, pytest_arguments) for comfyui in options.hosts]
    for outcome in outcomes:
        print(*(f"{outcome.version}: failed: {name}" for name in outcome.failed), sep="\n")
        reasons = Counter(outcome.skipped).most_common()
        print(*(f"{outcome.version}: {count} skipped: {reason}" for reason, count in reasons), sep="\n")
    print(table(outcomes, date.today()))
    return 0 if all(outcome.is_green for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
