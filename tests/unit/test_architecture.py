"""Import rules are rules of folders: data flows one way, and nothing points back."""
import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BELOW = {  # part of the core -> parts of it that it may import, besides itself
    "io": set(), "viz": set(), "noise": set(), "rng": set(),
    "schedules": {"noise"}, "sampling": {"noise", "rng"},
    "training": {"noise", "rng", "io"},
    "guiders": {"noise", "io", "viz"},
    "guidance": {"guiders", "training", "schedules", "sampling", "noise", "rng", "io"},
    "experts": {"guiders", "training", "schedules", "sampling", "noise", "rng", "io"},
}
BELOW["tinyworld"] = {"guidance", "experts", "viz"} | BELOW["guidance"]  # nothing but the pack's doors knows the tiny world
DOORS = {"cli", "cli_distill", "__main__", "__init__"}
FOREIGN = {"ppap_core": {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "ppap_core"},
           "nodes/schemas": {"torch", "comfy", "folder_paths", "nodes", "server", "execution", "latent_preview"}}
OPTIONAL = {"peft", "timm", "transformers", "PIL", "huggingface_hub", "diffusers", "accelerate"}


def files(folder: str) -> list[Path]:
    return sorted(file.relative_to(ROOT) for file in (ROOT / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    """(statement, parts of the module that it names, from the root of the repository when it is one of ours)."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parts[:len(file.parts) - node.level] if node.level else ()
            module = (*package, *(node.module.split(".") if node.module else ()))
            yield from ((node, (*module, alias.name) if not node.module else module) for alias in node.names)


@pytest.mark.parametrize("file", files("ppap_core"), ids=str)
def test_a_core_file_imports_only_what_lies_below(file: Path):
    part = file.with_suffix("").parts[1]
    ours = {module[1] for node, module in imports(file) if module[0] == "ppap_core" and getattr(node, "level", 0)}
    if part not in DOORS:
        assert ours <= BELOW[part] | {part}


@pytest.mark.parametrize("file", files("ppap_core"), ids=str)
def test_the_core_loads_heavy_libraries_in_functions(file: Path):
    for node, module in imports(file):
        absolute = not getattr(node, "level", 0)
        assert not (absolute and module[0] in FOREIGN["ppap_core"]), ast.unparse(node)
        assert not (absolute and module[0] in OPTIONAL and node.col_offset == 0), ast.unparse(node)


@pytest.mark.parametrize("file", files("nodes/schemas"), ids=str)
def test_a_schema_knows_of_comfyui_only_its_node_api(file: Path):
    for node, module in imports(file):
        assert module[0] not in FOREIGN["nodes/schemas"] or getattr(node, "level", 0), ast.unparse(node)


@pytest.mark.parametrize("file", files("nodes/bridge"), ids=str)
def test_the_bridge_imports_no_schema(file: Path):
    assert not [module for _, module in imports(file) if module[:2] == ("nodes", "schemas")]


@pytest.mark.parametrize("file", [*files("benchmarks"), *files("examples")], ids=str)
def test_benchmarks_and_examples_use_the_core_as_strangers(file: Path):
    for node, module in imports(file):
        assert module[0] not in ("nodes", "comfy"), ast.unparse(node)
        assert module[0] != "ppap_core" or not node.level, "by its public name"


@pytest.mark.parametrize("file", [*files("ppap_core"), *files("nodes"), Path("__init__.py")], ids=str)
def test_nothing_shipped_imports_benchmarks_or_examples(file: Path):
    assert not [module for _, module in imports(file) if module[0] in ("benchmarks", "examples", "tests")]


@pytest.mark.parametrize("file", [*files("ppap_core"), *files("nodes"), Path("__init__.py")], ids=str)
def test_nothing_shipped_runs_strings_or_reads_pickles(file: Path):
    tree = ast.parse((ROOT / file).read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    absolute = {module[0] for node, module in imports(file) if not getattr(node, "level", 0)}
    assert not absolute & {"pickle", "subprocess", "requests", "urllib", "socket"}
    assert "torch.load(" not in (ROOT / file).read_text()
