"""Several ComfyUIs: what differs between them, and the table of what the tests say on each."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest

from tools.host import ROOT, comfyui_path
from tools.host_versions import no_hidden_inputs, read_version
from tools.hosts import Outcome, read_outcome, table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.nodes.test_a" name="test_one"/>
<testcase classname="tests.nodes.test_a" name="test_two"><system-out>text</system-out></testcase>
<testcase classname="tests.nodes.test_a" name="test_three"><skipped message="no card"/></testcase>
<testcase classname="tests.nodes.test_b" name="test_four"><failure/></testcase>
<testcase classname="tests.nodes.test_b" name="test_five"><error/></testcase>
</testsuite></testsuites>"""


def test_the_version_is_read_off_the_folder(tmp_path: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", read_version(comfyui_path()))
    with pytest.raises(ValueError, match=r"comfyui_version.py' names no version: give the folder of a ComfyUI"):
        read_version(tmp_path)


def test_hidden_inputs_go_where_the_host_takes_them() -> None:
    assert no_hidden_inputs(lambda obj, hidden_inputs=None: None) == {"hidden_inputs": {}}
    assert no_hidden_inputs(lambda obj, v3_data=None: None) == {"v3_data": {"hidden_inputs": {}}}


def test_outcomes_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert not read_outcome("0.4.0", report).is_green, "pytest wrote nothing"
    report.write_text(REPORT)
    outcome = read_outcome("0.4.0", report)
    failed = ("tests.nodes.test_b::test_four", "tests.nodes.test_b::test_five")
    assert outcome == Outcome("0.4.0", passed=2, skipped=("no card",), failed=failed)
    assert not outcome.is_green
    assert Outcome("0.4.0", passed=2, skipped=("no card",), failed=()).is_green
    assert table([outcome], date(2026, 11, 25)).splitlines()[-1] == "| 0.4.0 | 2026-11-25 | 2 | 1 | 2 |"


def test_the_oldest_green_host_is_the_one_that_the_pack_requires() -> None:
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \| \d{4}-\d\d-\d\d \| \d+ \| \d+ \| (\d+) \|$", page, re.MULTILINE)
    green = [version for version, failed in rows if failed == "0"]
    oldest = min(green, key=lambda version: [int(number) for number in version.split(".")])
    assert f'requires-comfyui = ">={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
