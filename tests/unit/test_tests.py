"""Rules for the tests themselves."""
import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MODULES = sorted(TESTS.glob("*/test_*.py"))


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_no_test_module_imports_another(file: Path):
    imported = [node.module or "" for node in ast.walk(tree(file)) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree(file)) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in imported if name.startswith(("test_", "conftest", "tests."))], "share it in tests/helpers"
