"""Write what the schemas say into the nodes' help pages: title and description above the prose, inputs and outputs below it.

    python -m tools.help_pages PATH_TO_COMFYUI

A page is `# title`, the description as one paragraph, prose written by hand, `## Inputs` and `## Outputs`.
"""
import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "web" / "docs"


def page(schema: Any, old: str = "") -> str:
    """The help page of a node (a ComfyUI `io.Schema`), with the prose of the old page."""
    inputs = [_item(f"**{name}**{' (optional)' if optional else ''}", tooltip) for name, tooltip, optional in _slots(schema)]
    outputs = [_item(f"**{slot.display_name or slot.get_io_type()}**", slot.tooltip) for slot in schema.outputs or ()]
    parts = [f"# {schema.display_name}", schema.description, prose(old)]
    parts += ["## Inputs\n\n" + "\n".join(inputs)] if inputs else []
    parts += ["## Outputs\n\n" + "\n".join(outputs)] if outputs else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _slots(schema: Any) -> Iterator[tuple[str, str, bool]]:
    """Name, tooltip and whether it is optional, of each input; those that follow a choice come last, once, as in versions of
    ComfyUI that show them side by side."""
    followers: dict[str, str] = {}
    for slot in schema.inputs or ():
        if "." not in slot.id:
            yield slot.id, slot.tooltip, slot.optional
        else:
            followers[slot.id] = slot.tooltip
        for option in getattr(slot, "options", None) or ():
            followers |= {f"{slot.id}.{part.id}": part.tooltip for part in getattr(option, "inputs", ())}
    yield from ((name, tooltip, False) for name, tooltip in followers.items())


def _item(name: str, tooltip: str) -> str:
    lines = tooltip.splitlines()
    return f"- {name}: {tooltip}" if len(lines) == 1 else "\n  - ".join([f"- {name}:", *lines])


def prose(text: str) -> str:
    """The part of a page that is written by hand: after the title and the description, before inputs and outputs."""
    body = re.split(r"^## (?:Inputs|Outputs)$", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
    return "\n\n".join(re.split(r"\n{2,}", body)[2:])


def read(node_id: str) -> str:
    """The page of a node as it is, empty for a new node."""
    file = PAGES / f"{node_id}.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def registered(comfyui: Path) -> dict[str, Any]:
    """The node classes of this pack by their ids, loaded by the ComfyUI in this folder."""
    sys.argv = sys.argv[:1]  # ComfyUI reads the command line when it is imported
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    import utils.extra_config  # noqa: F401  before nodes, which puts another `utils` on the path

    import nodes

    assert asyncio.run(nodes.load_custom_node(str(ROOT)))
    return {name: kind for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("PPAP")}


def main() -> None:
    for node_id, kind in sorted(registered(Path(sys.argv[1]).resolve()).items()):
        old = read(node_id)
        new = page(kind.define_schema(), old)
        if new != old:
            (PAGES / f"{node_id}.md").write_text(new, encoding="utf-8")
            print(f"wrote {node_id}.md")


if __name__ == "__main__":
    main()
