"""Write the translations that ComfyUI's page reads, from the texts of the nodes and one table of translations.

    python -m tools.locales PATH_TO_COMFYUI

The table, translations.json, has a line for each English text and language. A text that a node says no longer is
dropped from it, with its translations; a new one is added without any. What has no translation in a language is shown in
English, which stands in the nodes alone. The page of ComfyUI 0.33 offers no German yet, and takes it as soon as it does.
"""
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .help_pages import ROOT, registered

TABLE = ROOT / "tools" / "translations.json"
LOCALES = ROOT / "locales"
COMPLETE = ("ja", "zh", "ko", "de")  # languages in which every text is translated; take out one that falls behind
CATEGORIES = ("tiny world", "targets", "experts", "autoguidance", "priors", "reports")  # the others are ComfyUI's own words

Translate = Callable[[str], str | None]
Table = dict[str, dict[str, str]]


def node_defs(schemas: dict[str, Any], translate: Translate) -> dict[str, Any]:
    """Return what nodeDefs.json says of nodes, by their ids. translate: None leaves a text out."""
    return {node: _without_gaps({
        "display_name": translate(schema.display_name), "description": translate(schema.description),
        "inputs": {name.replace(".", "_"): _slot(name.rpartition(".")[2], tooltip, translate)
                   for name, tooltip in _inputs(schema)},
        "outputs": {str(place): _slot(slot.display_name, slot.tooltip, translate)
                    for place, slot in enumerate(schema.outputs or ())},
    }) for node, schema in sorted(schemas.items())}


def _inputs(schema: Any) -> list[tuple[str, str]]:
    """The names and tooltips of a node's inputs, last those that follow a choice, each once."""
    slots = schema.inputs or ()
    nested = {f"{slot.id}.{inner.id}": inner.tooltip for slot in slots for option in getattr(slot, "options", None) or ()
              for inner in getattr(option, "inputs", ())}
    return [*((slot.id, slot.tooltip) for slot in slots), *nested.items()]


def _slot(name: str | None, tooltip: str, translate: Translate) -> dict[str, Any]:
    return _without_gaps({"name": translate(name) if name else None, "tooltip": translate(tooltip)})


def _without_gaps(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def texts(schemas: dict[str, Any]) -> list[str]:
    """All that nodes say in English, each text once."""
    return list(dict.fromkeys([*CATEGORIES, *_leaves(node_defs(schemas, str))]))


def _leaves(value: Any) -> Iterator[str]:
    for each in value.values():
        yield from _leaves(each) if isinstance(each, dict) else [each]


def read_table() -> Table:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def updated(table: Table, schemas: dict[str, Any]) -> Table:
    """The table with a place for each text that nodes say now."""
    return {text: table.get(text, {}) for text in texts(schemas)}


def missing(table: Table) -> list[tuple[str, str]]:
    """The languages and texts without a translation, of the languages that should be complete."""
    return [(language, text) for text, translations in table.items() for language in COMPLETE
            if language not in translations]


def files(table: Table, schemas: dict[str, Any]) -> dict[Path, str]:
    """The content of each file in locales/."""
    contents = {}
    for language in sorted({language for translations in table.values() for language in translations}):
        def translate(text: str, language: str = language) -> str | None:
            return table.get(text, {}).get(language)
        categories = _without_gaps({name: translate(name) for name in CATEGORIES})
        contents[LOCALES / language / "nodeDefs.json"] = _as_json(node_defs(schemas, translate))
        contents[LOCALES / language / "main.json"] = _as_json({"nodeCategories": categories})
    return contents


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    schemas = {node: kind.define_schema() for node, kind in registered(Path(sys.argv[1]).resolve()).items()}
    old = read_table()
    table = updated(old, schemas)
    TABLE.write_text(_as_json(table), encoding="utf-8")
    for file, content in files(table, schemas).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    for text in old.keys() - table.keys():
        print(f"dropped: {text}")
    for language, text in missing(table):
        print(f"not in {language}: {text}")


if __name__ == "__main__":
    main()
