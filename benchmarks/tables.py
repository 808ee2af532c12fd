"""The tables of the benchmark on the tiny world: values read from rows/*.json, and how their results are written.

A table says what is sampled and by which measure the best setting is chosen; a row, which method and which settings.
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ppap_core.io.files import read_json
from ppap_core.viz.drawing import save_picture
from ppap_core.viz.plots import Axes, Points, line_plot

from . import report
from .distillations import Distillation, FeatureDistillation, FreshNoise, Jitter, NeededExperts, PpapReference, RepeatedNoise
from .evaluation import LESS_IS_BETTER, MEASURES
from .labelled import LabelledExperts, LabelledNetworks
from .readout import Readout
from .report import Column
from .training import Plain, Training

TABLES = Path(__file__).parent / "rows"
MEASURED = 100_000  # the first scene of the images that are measured
PLOT_SIZE = (640, 1240)


TRAININGS: dict[str, type[Training]] = {
    "original": PpapReference, "whole": LabelledNetworks, "labels": LabelledExperts, "features": FeatureDistillation,
    "jitter": Jitter, "draws": RepeatedNoise, "where_needed": NeededExperts, "fresh_noise": FreshNoise, "readout": Readout,
    "edges": Distillation}
"""By the option that asks for one; the first that a row has counts."""


def read_training(given: Mapping[str, Any]) -> Training:
    """The training that a row's options describe; without any of the names of TRAININGS the plain guider."""
    kind = next((TRAININGS[name] for name in TRAININGS if name in given), Plain)
    return kind(**{name: tuple(value) if isinstance(value, list) else value
                   for name, value in given.items() if name not in kind.marks})


@dataclass(frozen=True)
class Row:
    """A method, and the settings among which the best is searched."""

    name: str
    method: str = "guidance"         # a key of methods.METHODS
    training: Training = Plain()     # of the guider
    ablation: str = ""               # a change of the guider, a key of ABLATIONS; "": none
    settings: Mapping[str, Any] = field(default_factory=dict)  # options of the method that are not searched
    points: tuple[Mapping[str, Any], ...] = ({},)              # settings that are searched
    steps: int = 0                   # of the sampler; 0: the table's. Experts learn from the table's in any case
    first_scene: int = MEASURED      # of the images that are measured: another shows the spread

    @classmethod
    def read(cls, given: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> "Row":
        """A row of a table's file. points: those of the table, for guided rows that bring none of their own."""
        method = given.get("way", cls.method)
        return cls(given["row"], method, read_training(given.get("training", {})), given.get("variant", ""),
                   given.get("settings", {}), tuple(given.get("points", points if method == "guidance" else [{}])),
                   given.get("steps", 0), given.get("scenes_from", MEASURED))


@dataclass(frozen=True)
class Table:
    """A table; everything that its results depend on, besides the weights of the world."""

    title: str
    task: str
    rows: tuple[Row, ...]
    images: int = 5000        # of a row at its best setting
    search: int = 256         # images for each setting that is searched, of other scenes
    steps: int = 16           # of Euler's sampler
    schedule: str = "karras"  # of its noise levels, or "ddim"
    scenes: int = 20_000      # real scenes for Frechet distances
    label: int | None = None  # the class of all scenes; None: each scene has its own
    reference: str = ""       # the row with whose guider the others are compared, by noise level; "": none
    choose: str = "score"     # the measure by which the best setting is chosen, or "frechet"
    cost_images: int = 32     # images of which costs are measured

    @cached_property
    def by_name(self) -> dict[str, Row]:
        """The rows by their names."""
        return {row.name: row for row in self.rows}

    @property
    def less_is_better(self) -> bool:
        """Whether the best setting has the least of the measure `choose`."""
        return self.choose == "frechet" or self.task in LESS_IS_BETTER


def table_file(name: str) -> Path:
    """The file of a table. ValueError for a name without one."""
    names = sorted(file.stem for file in TABLES.glob("*.json"))
    if name not in names:
        raise ValueError(f"there is no table '{name}': expected one of {', '.join(names)}")
    return TABLES / f"{name}.json"


def read_table(name: str) -> Table:
    """A table by its name. ValueError where there is none."""
    document = read_json(table_file(name))
    points = document.pop("points")
    return Table(**{**document, "rows": tuple(Row.read(given, points) for given in document["rows"])})


COLUMNS = (Column("by the second judge", "{second_score:.3g}"), Column("by the guider", "{own_score:.3g}"),
           Column("Fréchet", "{frechet:.3g}"), Column("precision", "{precision:.3g}"), Column("recall", "{recall:.3g}"),
           Column("energy", "{energy:.3g}"), Column("time, times plain", "{time_ratio:.3g}"),
           Column("forward passes", "{forwards:.3g}"), Column("backward passes", "{backwards:.3g}"),
           Column("trained share", "{trainable_share:.3g}"), Column("training images", "{training_images:.3g}"),
           Column("training minutes", "{training_minutes:.3g}"))


def markdown(title: str, task: str, rows: Sequence[report.Row]) -> str:
    """Results of a table's rows in Markdown."""
    columns = (Column(title, "{row}", numeric=False), Column(MEASURES[task], "{score:.3f}"), *COLUMNS,
               Column("setting", "{setting}", numeric=False))
    return report.markdown(columns, [row | {"setting": setting_text(row["setting"])} for row in rows])


def setting_text(setting: Mapping[str, float]) -> str:
    """A setting in a cell of a table."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def write_table(name: str, rows: Sequence[report.Row], path: Path) -> str:
    """Write results as JSON, as Markdown, and as plots of scores and of agreement; returns the Markdown."""
    document = read_json(table_file(name))
    text = markdown(document["title"], document["task"], rows)
    report.write_report(path, {"table": document, "rows": rows}, text)
    points: dict[str, Points] = {row["row"]: [(row["frechet"], row["score"])] for row in rows}
    axes = Axes("Frechet distance, less is better", MEASURES[document["task"]], log_x=True)
    save_picture(line_plot(points, document["title"], axes, PLOT_SIZE), path.with_suffix(".png"))
    if lines := agreement_lines(rows, document.get("reference", "")):
        title = f"{document['title']}: distance from the answers of '{document['reference']}'"
        save_picture(line_plot(lines, title, Axes("noise level sigma", "less is better", log_x=True), PLOT_SIZE),
                     path.with_name(f"{path.stem}_agreement.png"))
    return text


def agreement_lines(rows: Sequence[report.Row], reference: str) -> dict[str, Points]:
    """(noise level, distance from the reference) of every guider, under the name of its first row."""
    lines: dict[str, tuple[str, dict[str, float]]] = {}
    for row in rows:
        if "agreement" in row and row["row"] != reference:
            lines.setdefault(json.dumps(row["training"]), (row["row"], row["agreement"]))
    return {name: [(float(level), distance) for level, distance in line.items()] for name, line in lines.values()}
