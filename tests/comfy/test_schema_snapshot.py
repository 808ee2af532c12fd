"""The nodes that workflows were saved with: they may only grow.

After a node has grown, take the new schemas into the snapshot, which is refused where something is lost:

    PPAP_REFRESH_SCHEMAS=1 python -m pytest tests/comfy/test_schema_snapshot.py
"""
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.node_schemas import lost, schemas_of

LISTS_OF_FILES = ("guider_name", "file_name", "_network", "classifier")
SNAPSHOT = Path(__file__).parents[1] / "fixtures" / "node_schemas.json"


@pytest.fixture
def saved() -> dict:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_nodes_have_only_grown(comfy, saved: dict):
    """Nothing removed, renamed, reordered, retyped or narrowed; new inputs are optional and come last."""
    now = json.loads(json.dumps(schemas_of(comfy.registered)))
    assert not lost(saved, now)
    if os.environ.get("PPAP_REFRESH_SCHEMAS"):
        grown = {name: _with_old_options(schema, saved.get(name)) for name, schema in now.items()}
        SNAPSHOT.write_text(as_text(grown), encoding="utf-8")


def _with_old_options(schema: dict, old: dict | None) -> dict:
    """Lists of files keep what every install has: what other tests put into the folders is no part of a node."""
    before = {each["name"]: each.get("options") for each in old["inputs"]} if old else {}
    for each in schema["inputs"]:
        if each["name"].endswith(LISTS_OF_FILES) and before.get(each["name"]) is not None:
            each["options"] = before[each["name"]]
    return schema


def as_text(schemas: dict[str, dict]) -> str:
    """JSON with a line for each input, so that a change is one line in a comparison."""
    nodes = []
    for name, schema in sorted(schemas.items()):
        inputs = ",".join(f"\n    {json.dumps(each)}" for each in schema["inputs"])
        nodes.append(f'  "{name}": {{"output_node": {json.dumps(schema["output_node"])}, '
                     f'"outputs": {json.dumps(schema["outputs"])}, "inputs": [{inputs}]}}')
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def the(schema: dict, name: str) -> dict:
    return next(each for each in schema["inputs"] if each["name"] == name)


LOSSES: dict[str, tuple[Callable[[dict], object], str]] = {
    "a node renamed": (lambda nodes: nodes.update(PPAPOther=nodes.pop("PPAPRule")), "PPAPRule is gone"),
    "an input renamed": (lambda nodes: the(nodes["PPAPRule"], "rule").update(name="kind"), "and are ['kind'"),
    "an input removed": (lambda nodes: nodes["PPAPTinyWorld"]["inputs"].pop(), "PPAPTinyWorld: the inputs were"),
    "inputs swapped": (lambda nodes: nodes["PPAPTrainLora"]["inputs"].reverse(), "expected new ones at the end"),
    "a required input added": (lambda nodes: nodes["PPAPRule"]["inputs"].append(
        {"name": "more", "type": "INT", "optional": False}), "PPAPRule.more: new inputs must be optional"),
    "a socket retyped": (lambda nodes: the(nodes["PPAPSaveExperts"], "guider").update(type="GUIDER"), "'PPAP_GUIDER'"),
    "a default changed": (lambda nodes: the(nodes["PPAPDistilExperts"], "temperature").update(default=0.5), "default was"),
    "a range narrowed": (lambda nodes: the(nodes["PPAPTrainLora"], "rank").update(max=64), "max was 512 and is 64"),
    "an option renamed": (lambda nodes: the(nodes["PPAPRule"], "rule")["options"].__setitem__(0, "colors"),
                          "['colours'] are gone"),
    "an output removed": (lambda nodes: nodes["PPAPTinyWorld"]["outputs"].pop(), "the outputs were"),
    "an output retyped": (lambda nodes: nodes["PPAPRule"]["outputs"].__setitem__(0, "MODEL"), "the outputs were"),
    "no longer an end": (lambda nodes: nodes["PPAPSaveExperts"].update(output_node=False), "output_node was True")}


def test_only_new_terms_begin_with_a_weight_that_falls(comfy):
    nodes = schemas_of(comfy.registered)
    factors = {name: tuple(the(nodes[name], factor)["default"] for factor in ("factor_at_start", "factor_at_end"))
               for name in ("PPAPGuidanceTerm", "PPAPAutoguidance")}
    assert factors == {"PPAPGuidanceTerm": (2.0, 0.0), "PPAPAutoguidance": (1.0, 1.0)}


@pytest.mark.parametrize("change, words", LOSSES.values(), ids=LOSSES)
def test_a_loss_is_found_and_named(saved: dict, change: Callable[[dict], object], words: str):
    now = copy.deepcopy(saved)
    change(now)
    found = lost(saved, now)
    assert found and any(words in each for each in found), found


def test_growth_is_no_loss(saved: dict):
    now = copy.deepcopy(saved)
    now["PPAPNew"] = now["PPAPRule"]
    rule = now["PPAPRule"]
    the(rule, "rule")["options"].append("another")
    rule["inputs"].append({"name": "more", "type": "FLOAT", "optional": True, "default": 1.0})
    rule["outputs"].append("IMAGE")
    the(now["PPAPTrainLora"], "rank").update(max=1024)
    the(now["PPAPGuidanceTerm"], "weight").update(default=0.123)  # required, so that saved work brings its own value
    assert not lost(saved, now)
