"""Pages for developers: every link leads somewhere, and names beside a link are in the file that it leads to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.help_images import SHOWN
from tools.host import ROOT

PAGES = (
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "mini/README.md",
    "docs/cancelling.md",
    "docs/hosts.md",
    "docs/models.md",
    "docs/nodes.md",
    "docs/other-packs.md",
    "docs/reliability.md",
    "docs/small-model.md",
    "docs/training.md",
)

#: A link, and the names in backticks that follow it: [`file.py`](path/to/file.py) `function`
LINK = re.compile(r"\]\(([^)#\s]+)\)((?:\s*(?:and|,)?\s*`\w+`)*)")


def links(page: str) -> list[tuple[str, Path, list[str]]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [(target, re.findall(r"`(\w+)`", names)) for target, names in LINK.findall(text)]
    return [(target, (ROOT / page).parent / target, names) for target, names in found if not target.startswith("http")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert [target for target, path, _ in links(page) if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_beside_a_link_are_in_the_file(page):
    missing = []
    for target, path, names in links(page):
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            missing += [f"{target}: {name}" for name in names if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_every_help_page_is_linked_in_the_list_of_nodes():
    pages = {path for path in (ROOT / "web" / "docs").glob("*.md")}
    assert pages <= {path.resolve() for _, path, _ in links("docs/nodes.md")}


def test_help_pages_show_the_images_that_there_are():
    """By a path from the page's folder, which the frontend completes: web/docs/images is served beside the pages."""
    folder = ROOT / "web" / "docs"
    shown = {
        image for page in folder.rglob("*.md") for image in re.findall(r"!\[[^\]]+\]\((\S+)\)", page.read_text("utf-8"))
    }
    images = {f"images/{path.name}": path.stat().st_size for path in (folder / "images").iterdir()}
    assert shown == images.keys()
    assert sum(images.values()) < 1_500_000
    assert {f"images/{node}.jpg" for nodes in SHOWN.values() for node in nodes} <= shown


def test_architecture_names_a_good_many():
    assert sum(len(names) for _, _, names in links("ARCHITECTURE.md")) > 20


def test_import_rules_name_every_room():
    rules = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rooms = {
        path.name.removesuffix(".py") for path in (ROOT / "blip_qformer").iterdir() if not path.name.startswith("_")
    }
    layers = set(re.findall(r"\w+", rules.partition("layers = [")[2].partition("]")[0]))
    assert layers == rooms
