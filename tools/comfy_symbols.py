"""List what the pack uses of ComfyUI, with parameters, and say what of it another ComfyUI lacks.

    python -m tools.comfy_symbols PATH_TO_COMFYUI

writes tools/comfy_symbols.json. A symbol is a dotted name below `comfy` that the source of `nodes/` spells out, or an
attribute of an argument that is annotated with a class of ComfyUI's.
"""
import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")
PACKAGES = ("comfy", "comfy_execution", "comfy_kitchen")


@cache
def used() -> dict[str, list[str]]:
    """The symbols, and the files that use each."""
    sources = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(ROOT.glob("nodes/**/*.py"))}
    aliases = dict(pair for tree in sources.values() for pair in _aliases(tree))
    found: dict[str, list[str]] = {}
    for file, tree in sources.items():
        names = {**aliases, **dict(_imports(tree))}
        for symbol in sorted({*_spelled(tree, names), *_of_arguments(tree, names)}):
            found.setdefault(symbol, []).append(file.relative_to(ROOT).as_posix())
    return found


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that `from comfy.x import y` binds, and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in PACKAGES:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that are assigned something of ComfyUI's, such as `Patcher: TypeAlias = comfy...`."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        symbol = _dotted(node.value, {}) if targets and node.value else None
        if symbol and len(targets) == 1 and isinstance(targets[0], ast.Name):
            yield targets[0].id, symbol


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """The symbol that an expression spells, or None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    root = names.get(node.id, node.id)
    return ".".join([root, *reversed(parts)]) if root.split(".")[0] in PACKAGES and (parts or "." in root) else None


def _spelled(tree: ast.AST, names: dict[str, str]) -> Iterator[str]:
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in inner and (symbol := _dotted(node, names)):
            yield symbol


def _of_arguments(tree: ast.AST, names: dict[str, str]) -> Iterator[str]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            kinds = {argument.arg: _dotted(argument.annotation, names) for argument in function.args.args
                     if argument.annotation}
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and kinds.get(node.value.id):
                    yield f"{kinds[node.value.id]}.{node.attr}"


def state_of(symbol: str) -> str | None:
    """What a symbol is in the ComfyUI at hand: its parameters, "value" for what is not called, None where it is missing."""
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return _state_in(value, parts[length:])
    return None


def _state_in(value: Any, path: list[str]) -> str | None:
    for name in path:
        if inspect.isclass(value) and not hasattr(value, name):  # an attribute that is set when it is made
            sets = any(f"self.{name} =" in _source(kind) or f"self.{name}:" in _source(kind) for kind in value.__mro__[:-1])
            return "value" if sets else None
        if not hasattr(value, name):
            return None
        value = getattr(value, name)
    return _parameters(value) if inspect.isroutine(value) or inspect.isclass(value) else "value"


@cache
def _source(kind: type) -> str:
    return inspect.getsource(kind)


def _parameters(value: Any) -> str:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return "value"
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(f"{stars.get(each.kind, '')}{each.name}{'' if each.default is each.empty else '='}"
                     for each in parameters)


def states() -> dict[str, str | None]:
    """Every symbol as it is in the ComfyUI at hand."""
    return {symbol: state_of(symbol) for symbol in used()}


def differences(record: dict[str, dict[str, str | None]], version: str) -> list[str]:
    """What the ComfyUI at hand lacks, or takes otherwise than every version of the record, in words."""
    said = []
    for symbol, files in used().items():
        now, known = state_of(symbol), [old[symbol] for old in record.values() if old.get(symbol)]
        if symbol in record.get(version, {}) and record[version][symbol] == now:
            continue
        where = f"{symbol}, which {' and '.join(files)} uses,"
        if known and now is None:
            said.append(f"{where} is not in ComfyUI {version}")
        elif known and not any(_serves(old, now) for old in known):
            said.append(f"{where} takes ({now}) in ComfyUI {version}, and took ({known[-1]})")
    return said


def _serves(old: str, now: str) -> bool:
    """Whether calls that the old parameters allow are allowed by those of now; the names' order counts."""
    before, after = old.split(", "), now.split(", ")
    kept = [name for name in after if name in before]
    return kept == before and all(name.endswith("=") or name.startswith("*") for name in after if name not in before)


def unknown(record: dict[str, dict[str, str | None]]) -> list[str]:
    """The symbols that the record does not have."""
    return [symbol for symbol in used() if not all(symbol in states for states in record.values())]


def main() -> None:
    comfyui = Path(sys.argv.pop(1)).resolve()  # ComfyUI reads the command line when it is imported
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    from comfyui_version import __version__ as version

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    print("\n".join(differences(record, version)) or f"ComfyUI {version} has all that the pack uses")
    record[version] = states()
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
