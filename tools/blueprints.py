"""Write the subgraph blueprints: groups of nodes that ComfyUI lists among its own, to be used as one node.

    python -m tools.blueprints PATH_TO_COMFYUI

ComfyUI 0.33 finds them in `subgraphs/`; 0.3.64 knows no blueprints.
"""
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .pages import Out, Page
from .workflows import ROOT, object_info, write

FOLDER = ROOT / "subgraphs"
INPUT, OUTPUT = -10, -20  # ids of what stands for the inputs and the outputs inside
ROW = 20  # pixels


class Slot(NamedTuple):
    """An input of the whole that is an input of a node inside; label: as it is called outside."""

    label: str
    node: int
    name: str


class Blueprint(NamedTuple):
    """What a blueprint is for, its inputs, and the node whose first output it gives."""

    description: str
    inputs: tuple[Slot, ...]
    output: int


def _term(page: Page, guider: Out) -> tuple[int, int]:
    page.column()
    term = page.add("PPAPGuidanceTerm", guider=guider)
    page.column()
    return term, page.add("PPAPApplyGuidance", terms=Out(term))


def palette(page: Page) -> Blueprint:
    colors = page.add("PPAPPalette")
    rule = page.add("PPAPRule", rule="colours")
    page.column()
    aimed = page.add("PPAPAimAtImage", guider=Out(rule), image=Out(colors))
    term, applied = _term(page, Out(aimed))
    return Blueprint("Guides a model towards the colours of a palette, wherever they are in the image.",
                     (Slot("model", applied, "model"), Slot("colours", colors, "colours"), Slot("weight", term, "weight"),
                      Slot("mask", term, "mask"), Slot("vae", applied, "vae")), applied)


def depth(page: Page) -> Blueprint:
    guider = page.add("PPAPLoadGuider", guider_name="tinyworld/depth")
    page.column()
    aimed = page.add("PPAPAimAtImage", guider=Out(guider))
    term, applied = _term(page, Out(aimed))
    return Blueprint("Guides a model towards the depth of an image, as a depth network sees it.",
                     (Slot("model", applied, "model"), Slot("image", aimed, "image"),
                      Slot("depth network", guider, "guider_name"), Slot("weight", term, "weight"),
                      Slot("mask", term, "mask"), Slot("vae", applied, "vae")), applied)


def classifier(page: Page) -> Blueprint:
    guider = page.add("PPAPLoadGuider", guider_name="tinyworld/class")
    page.column()
    aimed = page.add("PPAPAimAtClass", guider=Out(guider))
    term, applied = _term(page, Out(aimed))
    return Blueprint("Guides a model towards a class of your own classifier: its folder lies in models/ppap_guiders.",
                     (Slot("model", applied, "model"), Slot("classifier", guider, "guider_name"),
                      Slot("classes", aimed, "classes"), Slot("weight", term, "weight"), Slot("mask", term, "mask"),
                      Slot("vae", applied, "vae")), applied)


BLUEPRINTS: dict[str, Callable[[Page], Blueprint]] = {
    "Steer by palette": palette, "Steer by depth of an image": depth, "Steer by your own classifier": classifier}


def to_file(name: str, page: Page, blueprint: Blueprint) -> dict:
    """A blueprint as ComfyUI saves it: one node, and the definition of what is inside it."""
    number = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
    outer = {"id": len(page.nodes) + 1, "type": number, "pos": [0, 0], "size": [340, 220], "flags": {}, "order": 0,
             "mode": 0, "inputs": [_outer(page, slot) for slot in blueprint.inputs],
             "outputs": [{"name": "MODEL", "type": "MODEL", "links": None}], "title": name,
             "properties": {"proxyWidgets": [[str(slot.node), slot.name] for slot in blueprint.inputs
                                             if "widget" in _inner(page, slot)[1]]},
             "widgets_values": []}
    return {"revision": 0, "last_node_id": outer["id"], "last_link_id": 0, "nodes": [outer], "links": [], "version": 0.4,
            "definitions": {"subgraphs": [_definition(number, name, page, blueprint)]}, "extra": {}}


def _inner(page: Page, slot: Slot) -> tuple[int, dict]:
    """Where an input stands among those of its node, and what the page says of it."""
    inputs = page.nodes[slot.node - 1]["inputs"]
    return next((index, each) for index, each in enumerate(inputs) if each["name"] == slot.name)


def _outer(page: Page, slot: Slot) -> dict:
    inner = _inner(page, slot)[1]
    widget = {"widget": {"name": slot.label}} if "widget" in inner else {}
    optional = {"shape": inner["shape"]} if "shape" in inner else {}
    return {"name": slot.label, **optional, "type": inner["type"], **widget, "link": None}


def _definition(number: str, name: str, page: Page, blueprint: Blueprint) -> dict:
    links = [dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
             for link in page.links]
    inputs = []
    for index, slot in enumerate(blueprint.inputs):
        place, inner = _inner(page, slot)
        inner["link"] = len(links) + 1
        links.append({"id": len(links) + 1, "origin_id": INPUT, "origin_slot": index, "target_id": slot.node,
                      "target_slot": place, "type": inner["type"]})
        inputs.append(_end(name, slot.label, inner["type"], len(links), (-160, ROW * (index + 1)))
                      | ({"shape": inner["shape"]} if "shape" in inner else {}))
    page.nodes[blueprint.output - 1]["outputs"][0]["links"] = [len(links) + 1]
    links.append({"id": len(links) + 1, "origin_id": blueprint.output, "origin_slot": 0, "target_id": OUTPUT,
                  "target_slot": 0, "type": "MODEL"})
    right = page.x + page.width + 60
    return {"id": number, "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": len(page.nodes), "lastLinkId": len(links), "lastRerouteId": 0},
            "revision": 0, "config": {}, "name": name,
            "inputNode": {"id": INPUT, "bounding": [-240, 0, 140, ROW * (len(inputs) + 2)]},
            "outputNode": {"id": OUTPUT, "bounding": [right, 0, 120, 3 * ROW]},
            "inputs": inputs, "outputs": [_end(name, "MODEL", "MODEL", len(links), (right + 20, ROW))], "widgets": [],
            "nodes": page.nodes, "groups": [], "links": links, "extra": {}, "category": "PPAP",
            "description": blueprint.description}


def _end(name: str, label: str, kind: str, link: int, at: tuple[float, float]) -> dict:
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{label}")), "name": label, "type": kind, "linkIds": [link],
            "pos": [*at]}


def main() -> None:
    info = object_info(Path(sys.argv[1]).resolve())
    FOLDER.mkdir(exist_ok=True)
    for name, draw in BLUEPRINTS.items():
        page = Page(info, x=0)
        write(FOLDER / f"{name}.json", to_file(name, page, draw(page)))


if __name__ == "__main__":
    main()
