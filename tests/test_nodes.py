"""The nodes' source, read without ComfyUI: thin, described, and behind a few files that know it."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "nodes").glob("*.py"))
TREES = {file.name: ast.parse(file.read_text()) for file in FILES}
NODE_FILES = ("load.py", "guide.py", "autoguide.py", "train.py", "prior.py", "report.py")
OUTSIDE = {"torch", "comfy", "folder_paths", "latent_preview", "nodes", "numpy", "server", "execution", "math"}


def imported(tree: ast.AST) -> set[str]:
    """First parts of everything imported by an absolute name."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def classes(name: str) -> list[ast.ClassDef]:
    return [node for node in TREES[name].body if isinstance(node, ast.ClassDef)]


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == name)


LISTS = {function.name: part.value.elts for tree in TREES.values() for function in tree.body
         if isinstance(function, ast.FunctionDef) for part in function.body
         if isinstance(part, ast.Return) and isinstance(part.value, ast.List)}


def listed(value: ast.expr) -> list[ast.expr]:
    """The parts of a list; where nodes share inputs, a function returns a list of them."""
    if isinstance(value, ast.Starred):
        return listed(value.value)
    if isinstance(value, ast.Call):
        return LISTS[value.func.id]
    return [each for part in value.elts for each in (listed(part) if isinstance(part, ast.Starred) else [part])]


EVERY = [pytest.param(node, id=node.name) for name in NODE_FILES for node in classes(name)]


@pytest.mark.parametrize("name", TREES)
def test_no_node_file_knows_torch_or_comfyui_and_only_the_folders_its_folders(name: str):
    inside = ("models.py", "memory.py", "bad_model.py", "recipe.py", "distill.py", "tune.py", "search.py")
    known = {"bridge.py": {"comfy", "torch", "latent_preview"}, "guidance.py": {"comfy", "torch", "nodes"},
             "folders.py": {"folder_paths"}, **dict.fromkeys(inside, {"comfy", "torch"})}
    assert not imported(TREES[name]) & (OUTSIDE - known.get(name, set()))


@pytest.mark.parametrize("node", EVERY)
def test_a_node_unwraps_calls_and_wraps(node: ast.ClassDef):
    execute = method(node, "execute")
    lines = execute.end_lineno - execute.body[0].lineno + 1
    assert lines <= 15
    mathematics = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
    assert not [part for part in ast.walk(execute) if isinstance(part, ast.BinOp) and isinstance(part.op, mathematics)]


@pytest.mark.parametrize("node", EVERY)
def test_every_input_and_output_says_what_it_is(node: ast.ClassDef):
    [schema] = [part.value for part in method(node, "define_schema").body if isinstance(part, ast.Return)]
    given = {keyword.arg: keyword.value for keyword in schema.keywords}
    assert given["node_id"].value == node.name and given["description"] and given["display_name"]
    for slot in (*listed(given["inputs"]), *getattr(given.get("outputs"), "elts", [])):
        if isinstance(slot.func, ast.Attribute):  # the few shared inputs are functions
            assert "tooltip" in {keyword.arg for keyword in slot.keywords}, ast.unparse(slot)


@pytest.mark.parametrize("node", EVERY)
def test_execute_takes_the_inputs_in_the_order_of_the_schema(node: ast.ClassDef):
    [schema] = [part.value for part in method(node, "define_schema").body if isinstance(part, ast.Return)]
    [inputs] = [listed(keyword.value) for keyword in schema.keywords if keyword.arg == "inputs"]
    shared = {"limit_input": "max_rms", "terms_input": "terms", "vae_input": "vae"}
    names = [each.args[0].value if each.args else shared[each.func.id] for each in inputs]
    arguments = method(node, "execute").args
    assert [argument.arg for argument in arguments.args[1:]] == names
    optional = [name for name, each in zip(names, inputs, strict=True)
                if name == "vae" or "optional" in {word.arg for word in each.keywords}]
    assert names[len(names) - len(arguments.defaults):] == optional, "optional inputs have defaults and come last"


@pytest.mark.parametrize("node", EVERY)
def test_every_node_has_a_help_page_that_names_its_inputs(node: ast.ClassDef):
    page = (ROOT / "web" / "docs" / f"{node.name}.md").read_text()
    for argument in method(node, "execute").args.args[1:]:
        assert f"**{argument.arg}**" in page, f"{node.name}.md does not name {argument.arg}"


def test_nothing_shipped_runs_code_from_strings_or_reads_pickles():
    for file in (ROOT / "__init__.py", *FILES, *(ROOT / "ppap_core").rglob("*.py")):
        tree = ast.parse(file.read_text())
        called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not called & {"eval", "exec", "compile", "__import__"}, file
        assert not imported(tree) & {"pickle", "subprocess", "requests", "urllib", "socket"}, file
        assert "torch.load(" not in file.read_text(), file
