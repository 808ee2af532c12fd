"""The documentation names files that exist, and one version."""
import re
from pathlib import Path

import pytest

import ppap_core

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("nodes", "ppap_core", "benchmarks", "examples", "tests", "workflows", "subgraphs", "docs", "web", "tools",
           ".github")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    links = {page.parent / link.split("#")[0] for link in re.findall(r"\]\(([^)\s#][^)\s]*)\)", text) if "://" not in link}
    named = {ROOT / path for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if path.split("/")[0] in FOLDERS}
    assert not [str(file) for file in links | named if not file.exists()]


def test_the_map_of_the_code_names_its_modules():
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    modules = {file.name for file in (ROOT / "ppap_core").rglob("*.py")}
    assert {name.rsplit("/")[-1] for name in re.findall(r"`([\w/]+\.py)`", text)} <= modules


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and version[1] == ppap_core.__version__
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version[1]}\n" in (ROOT / "CHANGELOG.md").read_text()
