"""Pages as ComfyUI's front end saves them, from a description in a few lines: nodes in columns, columns in groups.

Links are `Out(node, slot)`, everything else is the value of a widget.
"""
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CHOICE = "COMFY_DYNAMICCOMBO_V3"  # an input that others follow
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", CHOICE}
PREVIEWS = {"KSampler": 480, "PPAPGuidedKSampler": 550, "PPAPGenerateSamples": 530, "PPAPDistilExperts": 540,
            "PPAPDistillReadout": 450, "PPAPBestSeeds": 560, "PPAPTrainGuider": 560,  # heights with what they show at work
            "PPAPSteer": 480}  # or in versions of ComfyUI that show all inputs
SIZES = {"PreviewImage": (300, 320), "SaveImage": (300, 320), "MarkdownNote": (400, 420), "PPAPReadGuidance": (400, 200),
         "PPAPPlotIntervals": (400, 420)}
GAP, TITLE, MARGIN = 60, 30, 20  # pixels between columns, of a title, around the nodes of a group


class Out(NamedTuple):
    """An output of a node on the page."""

    node: int
    slot: int = 0


class Slot(NamedTuple):
    """An input of a node: its name, its type, whether it may be left open, and the default of its widget."""

    name: str
    kind: str
    optional: bool
    default: Any
    seed: bool  # whether the front end shows beside it what becomes of it after a run

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGETS


def slots_of(info: dict, values: dict[str, Any]) -> Iterator[Slot]:
    """The inputs of a node in the order of its widgets. info: of /object_info. values: that were chosen."""
    for group in ("required", "optional"):
        for name, (kind, *more) in info["input"].get(group, {}).items():
            settings = more[0] if more else {}
            options = kind if isinstance(kind, list) else settings.get("options")
            first = options[0]["key"] if kind == CHOICE else options[0] if options else None
            default = settings.get("default", first)
            yield Slot(name, "COMBO" if isinstance(kind, list) else kind, group == "optional", default,
                       bool(settings.get("control_after_generate")) or name in ("seed", "noise_seed"))
            if kind == CHOICE:
                [option] = [option for option in options if option["key"] == values.get(name, default)]
                for slot in slots_of({"input": option["inputs"]}, {}):
                    yield slot._replace(name=f"{name}.{slot.name}")


@dataclass
class Page:
    """A page under construction. info: /object_info."""

    info: dict[str, dict]
    nodes: list[dict] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)
    app: dict = field(default_factory=dict)  # what App mode shows of the page
    x: float = 460
    y: float = 0
    width: float = 0

    def group(self, title: str) -> None:
        """Begin a group of columns, to the right of the last one."""
        self.column()
        self.groups.append({"id": len(self.groups) + 1, "title": title, "bounding": [self.x - MARGIN, -90, 0, 0],
                            "color": "#3f789e", "flags": {}})

    def column(self) -> None:
        """Begin a column, to the right of the last one."""
        self.x, self.y, self.width = self.x + (self.width + GAP if self.width else 0), 0, 0

    def note(self, title: str, text: str, at: tuple[float, float]) -> None:
        """Put a text on the canvas, at a place of its own."""
        self._place({"type": "MarkdownNote", "title": title, "inputs": [], "outputs": [], "widgets_values": [text]}, at,
                    SIZES["MarkdownNote"])

    def add(self, kind: str, title: str = "", /, **values: Any) -> int:
        """Put a node below the last one of its column; its id."""
        about, slots = self.info[kind], list(slots_of(self.info[kind], values))
        if unknown := values.keys() - {slot.name for slot in slots}:
            raise ValueError(f"{kind} has no inputs {sorted(unknown)}: expected {[slot.name for slot in slots]}")
        ordered = sorted(slots, key=lambda slot: slot.is_widget)  # the front end lists sockets first
        shown = [slot for slot in ordered if "." not in slot.name or not slot.is_widget]
        widgets = {}
        for slot in slots:
            if slot.is_widget:
                widgets[slot.name] = values.get(slot.name, slot.default)
                widgets |= {"control_after_generate": "fixed"} if slot.seed else {}
        outputs = [{"localized_name": name, "name": name, "type": str(kind), "links": None}
                   for name, kind in zip(about["output_name"], about["output"], strict=True)]
        node = {"type": kind, **({"title": title} if title else {}), "inputs": [_input(slot) for slot in shown],
                "outputs": outputs, "widgets_values": [*widgets.values()], "widgets_values_named": widgets}
        sockets = max(sum(not slot.is_widget for slot in slots), len(outputs))
        size = SIZES.get(kind, (310 if kind.startswith("PPAP") else 260, 24 + 20 * sockets + 24 * len(widgets)))
        place, (width, height) = (self.x, self.y), size
        self.y += max(height, PREVIEWS.get(kind, 0)) + TITLE + GAP
        self.width = max(self.width, width)
        self._place(node, place, size)
        self._grow_group(self.y - GAP)
        for index, slot in enumerate(shown):
            if isinstance(values.get(slot.name), Out):
                self._link(values[slot.name], node, index)
        return node["id"]

    def _place(self, node: dict, at: tuple[float, float], size: tuple[float, float]) -> None:
        number = len(self.nodes) + 1
        head = {"id": number, "type": node.pop("type"), "pos": [*at], "size": [*size], "flags": {}, "order": number - 1,
                "mode": 0}
        node |= head
        node["properties"] = {} if node["type"] == "MarkdownNote" else {"Node name for S&R": node["type"]}
        self.nodes.append(node)

    def _grow_group(self, bottom: float) -> None:
        if self.groups:
            box = self.groups[-1]["bounding"]
            box[2] = max(box[2], self.x + self.width + MARGIN - box[0])
            box[3] = max(box[3], bottom + MARGIN - box[1])

    def _link(self, source: Out, node: dict, index: int) -> None:
        output = self.nodes[source.node - 1]["outputs"][source.slot]
        number = len(self.links) + 1
        output["links"] = [*(output["links"] or []), number]
        node["inputs"][index]["link"] = number
        self.links.append([number, source.node, source.slot, node["id"], index, output["type"]])

    def show_in_app(self, widgets: dict[int, list[str]], outputs: list[int]) -> None:
        """Choose what App mode shows: widgets of nodes, and nodes whose images come out."""
        self.app = {"linearMode": False, "linearData": {"inputs": [[str(node), name] for node, names in widgets.items()
                                                                   for name in names],
                                                        "outputs": [str(node) for node in outputs]}}

    def to_workflow(self, name: str) -> dict:
        """The page as a file of its own."""
        return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "revision": 0, "last_node_id": len(self.nodes),
                "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links, "groups": self.groups,
                "config": {}, "extra": {"ds": {"scale": 0.6, "offset": [110, 180]}, **self.app}, "version": 0.4}


def _input(slot: Slot) -> dict:
    return {"localized_name": slot.name, "name": slot.name, **({"shape": 7} if slot.optional else {}), "type": slot.kind,
            **({"widget": {"name": slot.name}} if slot.is_widget else {}), "link": None}
