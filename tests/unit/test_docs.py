"""The documentation names files and tests that exist, and one version."""
import ast
import re
from functools import cache
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


@cache
def functions_of(name: str) -> set[str]:
    """The names of all functions of a file in tests/."""
    return {node.name for node in ast.parse((ROOT / "tests" / name).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_each_promise_names_tests_that_exist():
    """docs/quality.md lists R1 to R28, in order."""
    lines = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[0].strip("| "): re.findall(r"`([\w/]+\.py)::(\w+)`", line)
            for line in lines if line.startswith("| R")}
    assert [*rows] == [f"R{number}" for number in range(1, 29)]
    assert not [number for number, named in rows.items() if not named]
    assert not [f"{file}::{name}" for named in rows.values() for file, name in named if name not in functions_of(file)]
