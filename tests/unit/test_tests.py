"""Rules for the tests themselves."""
import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MODULES = sorted(TESTS.glob("*/test_*.py"))
LONGEST_NAME = 60


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_names_are_short(file: Path):
    functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)]
    names = [function.name for function in functions if function.name.startswith("test_")]
    assert not [name for name in names if len(name) > LONGEST_NAME], "say the sentence in the docstring"
    assert len(names) == len(set(names)), "one test hides another"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_no_test_module_imports_another(file: Path):
    imported = [node.module or "" for node in ast.walk(tree(file)) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree(file)) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in imported if name.startswith(("test_", "conftest", "tests."))], "share it in tests/helpers"
