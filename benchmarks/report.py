"""How all benchmarks are reported: progress as lines, results as JSON and as Markdown tables."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppap_core.io.files import read_json, write_bytes, write_json

Report = Callable[[str], None]
"""Takes one line of progress."""

Row = dict[str, Any]
"""One row of results, by the names that its JSON file uses."""


@dataclass(frozen=True)
class Column:
    """A column of a Markdown table.

    heading: its first line.
    cell: format string of a cell, with the names of a row: "{score:.3f}".
    numeric: whether cells are aligned to the right.
    """

    heading: str
    cell: str
    numeric: bool = True


def markdown(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """Rows as a Markdown table, ending in a newline."""
    lines = [_line(column.heading for column in columns),
             "|" + "".join("---:|" if column.numeric else "---|" for column in columns)]
    lines += [_line(column.cell.format_map(row) for column in columns) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_report(path: Path, results: Any, text: str) -> None:
    """Write results beside each other as `path`.json and `path`.md."""
    write_json(path.with_suffix(".json"), results)
    write_bytes(path.with_suffix(".md"), text.encode())


def cached_json(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON value that a file holds; made and written where there is none."""
    if not file.exists():
        write_json(file, make())
    return read_json(file)
