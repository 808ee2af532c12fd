"""Subgraph blueprints: the server lists them, and what is inside them guides."""
import json
from pathlib import Path
from urllib.error import HTTPError

import pytest
from helpers.comfy_server import Server
from helpers.graphs import MODEL, VAE, WORLD, inside, node, sampling
from PIL import ImageChops, ImageStat

FOLDER = Path(__file__).parents[2] / "subgraphs"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
PICTURE = {"8": node("KSampler", **sampling(seed=77)), "9": node("VAEDecode", samples=["8", 0], vae=VAE)}
GIVEN: dict[str, dict] = {"Steer by palette": {"colours": "#1d3557:5, #ffd166"},
         "Steer by depth of an image": {"image": ["9", 0], "depth network": "tinyworld/depth"},
         "Steer by your own classifier": {"classifier": "tinyworld/class", "classes": "star, ring"}}


def content(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def listed(server: Server) -> dict[str, dict]:
    """The pack's blueprints in ComfyUI's list, by name."""
    try:
        every = server.get("/global_subgraphs")
    except HTTPError:
        pytest.skip("this ComfyUI knows no blueprints")
    return {each["name"]: {"id": key, **each} for key, each in every.items() if each["source"] == "custom_node"}


def test_the_server_lists_and_serves_them(server: Server, listed: dict[str, dict]):
    assert sorted(listed) == NAMES == sorted(GIVEN)
    for name, entry in listed.items():
        assert json.loads(server.get(f"/global_subgraphs/{entry['id']}")["data"]) == content(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_inside_guides(server: Server, name: str):
    def pictures(weight: float) -> list:
        graph, output = inside(content(name), server.get("/object_info"), {"model": MODEL, "weight": weight, **GIVEN[name]})
        graph |= WORLD | PICTURE | {"5": node("KSampler", **sampling(model=output)),
                                    "6": node("VAEDecode", samples=["5", 0], vae=VAE),
                                    "7": node("PreviewImage", images=["6", 0])}
        return server.pictures(server.run(graph)["7"])

    for before, after in zip(pictures(0.0), pictures(0.7), strict=True):
        assert max(ImageStat.Stat(ImageChops.difference(before, after)).mean) > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_its_slots_lead_inside(name: str):
    """Every input of the whole is one of a node inside, of the same type, a widget where that is one."""
    [outer], [definition] = content(name)["nodes"], content(name)["definitions"]["subgraphs"]
    assert outer["type"] == definition["id"] and outer["title"] == definition["name"] == name
    nodes, links = ({each["id"]: each for each in definition[kind]} for kind in ("nodes", "links"))
    promoted = []
    for index, (shown, slot) in enumerate(zip(outer["inputs"], definition["inputs"], strict=True)):
        [link] = [links[number] for number in slot["linkIds"]]
        inner = nodes[link["target_id"]]["inputs"][link["target_slot"]]
        assert (link["origin_id"], link["origin_slot"], inner["link"]) == (-10, index, link["id"])
        assert shown["name"] == slot["name"] and shown["type"] == slot["type"] == inner["type"] == link["type"]
        assert ("widget" in shown) == ("widget" in inner)
        promoted += [[str(link["target_id"]), inner["name"]]] if "widget" in inner else []
    assert outer["properties"]["proxyWidgets"] == promoted
