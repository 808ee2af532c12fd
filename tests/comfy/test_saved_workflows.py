"""Workflows of version 0.1.0 mean the same to the nodes of today."""
import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.comfy_server import Server
from helpers.graphs import posted, quick

SAVED = Path(__file__).parents[1] / "fixtures" / "workflows"
NAMES = sorted(file.stem for file in SAVED.glob("*.json") if file.stem != "posted")
SHORT = ("latent", "rules")


def page(name: str) -> dict:
    return json.loads((SAVED / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(comfy, load_extras: Callable[..., None]) -> dict:
    """/object_info of the nodes in this process, with those of ComfyUI that the workflows use."""
    load_extras("custom_sampler", "images", "mask", "preview_any", "sd3")
    return {name: kind.GET_NODE_INFO_V1() if hasattr(kind, "GET_NODE_INFO_V1") else
            {"input": kind.INPUT_TYPES(), "output": kind.RETURN_TYPES} for name, kind in comfy.registered.items()}


def ours(graph: dict) -> dict:
    return {key: node for key, node in graph.items() if node["class_type"].startswith("PPAP")}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_workflow_is_valid(info: dict, name: str):
    """By ComfyUI's own check: nodes, types of links, ranges and options."""
    import execution

    graph = posted(page(name), info)
    drawn = {str(each["id"]) for each in page(name)["nodes"] if each["type"] != "MarkdownNote"}
    assert set(graph) == drawn, "every node is known"
    valid, error, _, node_errors = asyncio.run(execution.validate_prompt("saved", graph, None))
    assert valid and not node_errors, (error, node_errors)


@pytest.mark.parametrize("name", NAMES)
def test_saved_widgets_keep_their_inputs(info: dict, name: str):
    """A file keeps widgets by position: each value reaches the input that it reached when the file was saved."""
    before = json.loads((SAVED / "posted.json").read_text(encoding="utf-8"))[name]
    now = ours(posted(page(name), info))
    assert now.keys() == before.keys()
    for key, node in before.items():
        assert now[key]["class_type"] == node["class_type"]
        assert now[key]["inputs"].items() >= node["inputs"].items(), f"node {key}, {node['class_type']}"


@pytest.mark.parametrize("name", NAMES)
def test_saved_slots_have_the_types_of_the_nodes(info: dict, name: str):
    """The page joins links by the names and the types that the file holds."""
    for each in page(name)["nodes"]:
        if not each["type"].startswith("PPAP"):
            continue
        about = info[each["type"]]
        specs = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
        assert {slot["name"]: slot["type"] for slot in each["inputs"]}.items() <= {
            name: spec[0] for name, spec in specs.items()}.items(), each["type"]
        outputs = [slot["type"] for slot in each["outputs"]]
        assert list(about["output"])[:len(outputs)] == outputs, each["type"]


@pytest.mark.parametrize("name", SHORT)
def test_a_saved_workflow_runs(server: Server, name: str):
    graph = quick(posted(page(name), server.get("/object_info")))
    outputs = server.run(graph)
    shown = [key for key, node in graph.items() if node["class_type"] in ("PreviewImage", "SaveImage")]
    assert shown and all(outputs[key]["images"] for key in shown)
