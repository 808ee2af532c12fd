"""The source of the nodes, read without ComfyUI: schemas are thin and describe every input and output."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = {file.stem: ast.parse(file.read_text()) for file in sorted((ROOT / "nodes" / "schemas").glob("*.py"))}


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == name)


SHARED = {function.name: part.value for tree in TREES.values() for function in tree.body
          if isinstance(function, ast.FunctionDef) for part in function.body if isinstance(part, ast.Return)}


def slots(value: ast.expr) -> list[ast.Call]:
    """The inputs or outputs of a schema, through the functions that several schemas share."""
    if isinstance(value, ast.List):
        return [slot for part in value.elts for slot in slots(part)]
    if isinstance(value, ast.IfExp):  # what only some versions of ComfyUI have, as tests/comfy/test_steer.py checks
        return []
    if isinstance(value, ast.Starred):
        return slots(value.value)
    if isinstance(value.func, ast.Name):
        return slots(SHARED[value.func.id])
    return [value]


EVERY = [pytest.param(node, id=node.name) for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)]


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
    for side in given.keys() & {"inputs", "outputs"}:
        assert all("tooltip" in {keyword.arg for keyword in slot.keywords} for slot in slots(given[side])), side


@pytest.mark.parametrize("node", EVERY)
def test_a_node_is_found_by_five_phrases(node: ast.ClassDef):
    [schema] = [part.value for part in method(node, "define_schema").body if isinstance(part, ast.Return)]
    [phrases] = [[phrase.value for phrase in keyword.value.args] for keyword in schema.keywords if keyword.arg is None]
    assert len({phrase.casefold() for phrase in phrases}) == len(phrases) >= 5


@pytest.mark.parametrize("node", EVERY)
def test_execute_takes_the_inputs_in_the_order_of_the_schema(node: ast.ClassDef):
    [schema] = [part.value for part in method(node, "define_schema").body if isinstance(part, ast.Return)]
    inputs = [slot for keyword in schema.keywords if keyword.arg == "inputs" for slot in slots(keyword.value)]
    names = [slot.args[0].value for slot in inputs]
    arguments = method(node, "execute").args
    assert [argument.arg for argument in arguments.args[1:]] == names
    optional = [name for name, slot in zip(names, inputs, strict=True) if "optional" in {word.arg for word in slot.keywords}]
    assert names[len(names) - len(arguments.defaults):] == optional, "optional inputs have defaults and come last"


@pytest.mark.parametrize("node", EVERY)
def test_every_node_has_a_help_page_that_names_its_inputs(node: ast.ClassDef):
    page = (ROOT / "web" / "docs" / f"{node.name}.md").read_text()
    for argument in method(node, "execute").args.args[1:]:
        assert f"**{argument.arg}**" in page, f"{node.name}.md does not name {argument.arg}"
