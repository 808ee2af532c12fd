"""Import rules are rules of folders: data flows one way, and nothing points back."""
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

Part = TypeVar("Part", bound=ast.AST)
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


SHIPPED = [*files("ppap_core"), *files("nodes"), Path("__init__.py")]


@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_nothing_shipped_imports_benchmarks_or_examples(file: Path):
    assert not [module for _, module in imports(file) if module[0] in ("benchmarks", "examples", "tests")]


@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_nothing_shipped_runs_strings_or_reads_pickles(file: Path):
    tree = ast.parse((ROOT / file).read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    absolute = {module[0] for node, module in imports(file) if not getattr(node, "level", 0)}
    assert not absolute & {"pickle", "subprocess", "requests", "urllib", "socket"}
    assert "torch.load(" not in (ROOT / file).read_text()


def parts(file: Path, kind: type[Part]) -> list[Part]:
    return [node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, kind)]


def test_only_the_command_prints():
    """Everything else is logged, for ComfyUI to show or to keep."""
    printing = {str(file) for file in SHIPPED for call in parts(file, ast.Call) if ast.unparse(call.func) == "print"}
    assert printing == {"ppap_core/cli.py"}


def test_every_text_can_be_shown_on_every_console():
    """Older consoles of Windows raise an error for letters that their code page lacks."""
    texts = [(file, text.value) for file in SHIPPED for text in parts(file, ast.Constant) if isinstance(text.value, str)]
    assert len(texts) > 1000
    assert not [(str(file), text) for file, text in texts if text.encode("cp1252", "replace").decode("cp1252") != text]


def test_wrappers_take_what_later_versions_add():
    """ComfyUI has given the functions that it wraps new arguments before."""
    wrappers = [(file, function) for file in files("nodes") for function in parts(file, ast.FunctionDef)
                if "executor" in [argument.arg for argument in function.args.args]]
    assert len(wrappers) > 4
    assert not [(str(file), function.name) for file, function in wrappers
                if not (function.args.vararg and function.args.kwarg)]


def test_comfyui_is_patched_in_two_context_managers_alone():
    """Both put back what they replace, as tests/comfy/test_dynamic_vram.py and test_live_preview.py show."""
    foreign = FOREIGN["ppap_core"] | {"execution", "latent_preview", "torch"}
    targets = {(str(file), ast.unparse(target)) for file in SHIPPED for target in parts(file, ast.Attribute)
               if isinstance(target.ctx, ast.Store) and ast.unparse(target).split(".")[0] in foreign}
    assert targets == {("nodes/bridge/streaming.py", "comfy.ops.uncast_bias_weight"),
                       ("nodes/bridge/progress.py", "comfy.utils.ProgressBar.update_absolute")}
    assert not [*(ROOT / "web").rglob("*.js")], "a script on the page could change nodes of other packs"
