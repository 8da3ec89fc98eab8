"""Documentation names what exists: links between pages, the index, every file, and the code behind docs/paper.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {*ROOT.glob("*.md"), *DOCS, *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("[a-z]*/[a-z]*/README.md")}


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, fragment in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not fragment or fragment in anchors(target), f"{path}#{fragment}"


def test_the_index_lists_every_page():
    listed = set(re.findall(r"^\| \[.*?\]\((.*?)\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE))
    assert {name for name in listed if "/" not in name} == {page.name for page in DOCS} - {"README.md"}


def test_the_design_page_lists_every_file_of_the_package():
    listed, room = set(), None
    for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"### (laep_jax/[\w/]*):", line):
            room = heading[1]
        elif room and (file := re.match(r"\| `(\w+\.py)` \| \S", line)):
            listed.add(room + file[1])
    package = (ROOT / "laep_jax").rglob("*.py")
    assert listed == {str(path.relative_to(ROOT)) for path in package if path.name != "__init__.py"}


def test_the_code_that_the_paper_page_names_exists():
    named = re.findall(r"`([a-z_/]+\.py)(?:: (\w+))?`", (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for path, name in named:
        file = ROOT / path if path.startswith("tests/") else ROOT / "laep_jax" / path
        assert re.search(rf"^(def|class) {name}\b", file.read_text(), re.MULTILINE) if name else file.is_file(), path
