"""Draw the workflows that tell one story each, on the bundled models, and put the note on other models into all.

    python -m tools.workflows PATH_TO_COMFYUI [name ...]
"""
import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from .help_pages import registered
from .pages import Page
from .stories import choosing, models, networks, restoration, steering

ROOT = Path(__file__).parents[1]
OWN_TITLE = "With your own model"
BELOW_NOTE = (0, 480)  # where it stands on the pages that are drawn here
OWN_MODEL = """## With your own model
Open ComfyUI's own template of it (*Browse Templates*) and put the node that steers on the MODEL wire, last before the \
sampler. Prompts, LoRA, size and sampler stay. Steps and cfg of these templates:

| model | steps, cfg | mind |
|---|---|---|
| SDXL | 25, 8 | |
| FLUX.2 Klein | 4, 1; base 20, 5 | before its CFGGuider |
| Krea 2 Turbo | 8, 1 | |
| Anima | 30, 4 | |
| Z-Image | 25, 4; turbo 8, 1 | after ModelSamplingAuraFlow |

A turbo model leaves few steps to steer in: begin with *strong*; *substeps* of **Guidance Term** are for that too. No VAE \
is needed for the colours of these models' latents; connect it for fine detail. Classes, depth and regions: choose a \
network that **Download Guider** fetched, or your own in models/ppap_guiders, in place of those of tinyworld/, which know \
the tiny world only."""

STORIES: dict[str, Callable[[Page], None]] = {story.__name__: story for story in (
    steering.steer, steering.series, steering.seamless, steering.masks, steering.strengths, models.turbo, models.one_frame,
    models.baked, networks.own_classifier, networks.readout, networks.trained_guider, choosing.variety, choosing.best,
    restoration.colourise, restoration.enlarge, restoration.restore)}


def with_own_model(page: dict, at: tuple[int, int] = (-460, 0)) -> dict:
    """A page with the note on other models, the same on each. at: where, by default to the left of everything."""
    page["nodes"] = [node for node in page["nodes"] if node.get("title") != OWN_TITLE]
    number = max(node["id"] for node in page["nodes"]) + 1
    page["nodes"].append({"id": number, "type": "MarkdownNote", "pos": [*at], "size": [420, 560], "flags": {},
                          "order": len(page["nodes"]), "mode": 0, "inputs": [], "outputs": [], "title": OWN_TITLE,
                          "properties": {}, "widgets_values": [OWN_MODEL]})
    page["last_node_id"] = number
    return page


def object_info(comfyui: Path) -> dict[str, dict]:
    """What /object_info would tell, of ComfyUI's own nodes and this pack's."""
    ours = registered(comfyui)
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return {name: kind.GET_NODE_INFO_V1() if hasattr(kind, "GET_NODE_INFO_V1") else _old_info(kind)
            for name, kind in {**nodes.NODE_CLASS_MAPPINGS, **ours}.items()}


def _old_info(kind: type) -> dict:
    output = kind.RETURN_TYPES  # type: ignore[attr-defined]
    return {"input": kind.INPUT_TYPES(), "output": output,  # type: ignore[attr-defined]
            "output_name": getattr(kind, "RETURN_NAMES", output)}


def write(file: Path, page: dict) -> None:
    text = json.dumps(page, indent=1) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")


def main() -> None:
    comfyui, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(STORIES)
    info, pages = object_info(comfyui), {file.stem: file for file in (ROOT / "workflows").glob("*.json")}
    drawn = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in pages.items()}
    for name in names:
        page = Page(info)
        STORIES[name](page)
        drawn[name] = page.to_workflow(name)
    for name, content in sorted(drawn.items()):
        at = {"at": BELOW_NOTE} if name in STORIES else {}
        write(ROOT / "workflows" / f"{name}.json", with_own_model(content, **at))


if __name__ == "__main__":
    main()
