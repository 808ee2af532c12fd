"""The registry's archive holds what the pack needs at run time, and nothing else; metadata stands in one place."""
import ast
import sys
from pathlib import Path

import pytest

pytest.importorskip("pathspec")
from tools.archive import LARGEST, ROOT, build, published_files  # noqa: E402

if not (ROOT / ".git").exists():
    pytest.skip("the archive is made of what git tracks: run this in a clone", allow_module_level=True)
SHIPPED = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "nodes", "ppap_core", "workflows",
           "web", "locales", "subgraphs"}


@pytest.fixture(scope="module")
def names() -> set[str]:
    return set(published_files())


def imported(name: str) -> set[str]:
    """The files of ours that a file imports by relative imports."""
    files = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = Path(*Path(name).parts[:-node.level], *(node.module or "").split("."))
            places = [module, *(module / alias.name for alias in node.names)]
            files |= {str(file) for place in places for file in (place.with_suffix(".py"), place / "__init__.py")
                      if (ROOT / file).is_file()}
    return files


def test_it_holds_every_module_that_is_imported(names: set[str]):
    modules = [name for name in names if name.endswith(".py")]
    assert "nodes/schemas/guidance.py" in modules and "ppap_core/cli.py" in modules
    assert not set().union(*map(imported, modules)) - names


def test_it_holds_weights_workflows_and_help_pages(names: set[str]):
    needed = [file for pattern in ("ppap_core/tinyworld/weights/**/*.safetensors", "workflows/*.*", "subgraphs/*.json",
                                    "web/docs/*.md")
              for file in ROOT.glob(pattern)]
    assert len(needed) > 50 and not {file.relative_to(ROOT).as_posix() for file in needed} - names


def test_it_holds_nothing_else(names: set[str]):
    assert {name.split("/")[0] for name in names} <= SHIPPED


def test_it_is_small_enough(tmp_path: Path):
    unpacked, packed = build(tmp_path / "archive.zip")
    assert packed <= unpacked <= LARGEST


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_requirements_are_those_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / "requirements.txt").read_text().split() == project["dependencies"]
