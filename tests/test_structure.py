"""Who may import whom: data flows one way, and nothing points back."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # file of ppap_core -> files of it that it may import
    "noise": "", "tasks": "", "files": "", "plots": "", "metrics": "", "digest": "", "preprocess": "", "download": "",
    "sampling": "noise", "samples": "files noise sampling", "guider": "preprocess tasks", "pictures": "guider plots",
    "targets": "guider plots tasks", "rules": "guider preprocess",
    "from_timm": "files guider preprocess", "from_transformers": "files guider preprocess",
    "loaders": "files from_timm from_transformers guider tinyworld",
    "experts": "files guider noise view", "bank_file": "experts files guider noise view", "costs": "experts noise",
    "view": "", "readout": "",
    "guidance": "guider noise sampling tasks",  # not experts: a bank is just a network
    "autoguidance": "guidance noise sampling", "lowrank": "", "finetune": "lowrank noise optimise",
    "training_free": "guidance guider noise sampling", "prior": "guidance guider noise optimise sampling",
    "memory": "guidance guider", "speed": "costs guidance guider noise preprocess sampling view",
    "distill": "experts guider noise optimise samples sampling tasks", "optimise": "files",
}
TOP = {"cli", "__main__", "__init__"}  # may import everything
OPTIONAL = {"peft": {"experts"}, "timm": {"from_timm", "costs", "speed"}, "transformers": {"from_transformers"},
            "PIL": {"plots"}, "huggingface_hub": {"download"}, "diffusers": {"speed"}}
CORE = sorted((ROOT / "ppap_core").glob("*.py"))
ALL = sorted((ROOT / "ppap_core").rglob("*.py"))


def imports(file: Path) -> list[tuple[ast.stmt, str]]:
    """(statement, what it imports): relative names without their dots."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("file", [file for file in CORE if file.stem not in TOP], ids=lambda file: file.stem)
def test_a_core_file_imports_only_what_lies_below_it(file: Path):
    own = {name.split(".")[0] for node, name in imports(file) if isinstance(node, ast.ImportFrom) and node.level}
    assert own <= set(ALLOWED[file.stem].split())


@pytest.mark.parametrize("file", ALL, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_core_never_knows_comfyui_and_loads_heavy_libraries_late(file: Path):
    absolute = [(node, name.split(".")[0]) for node, name in imports(file) if not getattr(node, "level", 0)]
    assert not {name for _, name in absolute} & {"comfy", "comfy_api", "folder_paths", "nodes", "ppap_core"}
    for node, name in absolute:
        if name in OPTIONAL and "tinyworld" not in file.parts:
            assert file.stem in OPTIONAL[name] and node.col_offset > 0, f"{name} belongs in a function of {OPTIONAL[name]}"


def test_the_nodes_import_from_the_core_and_the_core_nothing_from_them():
    order = ["types", "folders", "memory", "models", "bad_model", "bridge", "guidance", "recipe",
             {"distill", "tune", "search"}, {"load", "guide", "autoguide", "train", "report"}, "prior"]
    below: set[str] = set()
    for level in order:
        names = {level} if isinstance(level, str) else level
        for name in names:
            own = {part for node, what in imports(ROOT / "nodes" / f"{name}.py")
                   if isinstance(node, ast.ImportFrom) and node.level == 1
                   for part in ([what] if what else [alias.name for alias in node.names])}
            assert own <= below, f"{name}.py imports {own - below}"
        below |= names


def test_only_tinyworld_itself_and_what_loads_it_know_the_tiny_world():
    knowing = {file.stem for file in CORE if any(name.startswith("tinyworld") for node, name in imports(file))}
    assert knowing <= {"loaders", "cli"}
