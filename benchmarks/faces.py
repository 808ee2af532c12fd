"""Guidance of a real diffusion model of faces by real networks: plain, with experts, and by training-free methods.

The network that guides is one author's and the network that judges another's. Faces are searched at the best of three
strengths by that judge, on other faces than those that are measured.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ppap_core import ExpertSchedule, karras_sigmas
from ppap_core.viz.plots import Axes, Points, line_plot

from . import report
from .distillations import Distillation, FreshNoise, NeededExperts
from .face_evaluation import FaceEvaluator, unguided_faces
from .face_readout import FaceReadout
from .face_world import SIGMA_MAX, SIGMA_MIN, STEPS, load_face_world
from .report import Column, Report
from .report import Row as Result
from .runs import run_rows
from .tables import PLOT_SIZE, Row, Table, setting_text
from .training import Plain, Training, Workspace

LEVELS = karras_sigmas(STEPS, SIGMA_MIN, SIGMA_MAX)[:-1].tolist()
LEARNING: dict[str, Any] = {"edges": ExpertSchedule.equal_shares(5, SIGMA_MIN, SIGMA_MAX, LEVELS).edges, "rank": 8,
                            "batch": 32, "images": 1536}
IN_NOISE = LEARNING | {"steps": 400, "warm_start": True}  # where the plain network knows least, a neighbour knows more
PERSON = "one of four persons"  # the title of the table whose guider is the network for identity
MANY: dict[str, Any] = {"images": 4096, "varied": True}
READING = {"edges": LEARNING["edges"], "batch": 32, "images": 1536, "steps": 300}
FALLING = {"balanced": True, "falls_from": SIGMA_MAX, "falls_to": SIGMA_MIN}
FEW_STEPS = (4, 8)  # of the sampler
RENEWED = {"share": 0.3}  # of the noise, in each step, as ancestral samplers draw it
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {  # among which the best is searched, for guidance
    "noisy": tuple({"weight": weight, **FALLING} for weight in (0.2, 0.35, 0.7)),
    "constant": tuple({"weight": weight, "balanced": True} for weight in (0.2, 0.3, 0.45)),
    "denoised": tuple({"weight": weight, **FALLING} for weight in (0.35, 0.5, 0.7)),
    "through": (*({"weight": weight, "balanced": True, "through": True} for weight in (0.3, 0.45)),
                {"weight": 0.35, "through": True, **FALLING}),
}


@dataclass(frozen=True)
class FaceBench:
    """Everything that a result depends on, besides the networks and the settings of each row."""

    images: int = 256     # of a row at its best setting
    search: int = 32      # other images, of each setting that is searched
    unguided: int = 2000  # faces that Frechet distances are taken to
    fresh: Training = field(default_factory=lambda: FreshNoise("noisy", **IN_NOISE))        # experts as in the paper
    noisy: Training = field(default_factory=lambda: Distillation("noisy", **IN_NOISE))      # along trajectories
    readout: Training = field(default_factory=lambda: FaceReadout("noisy", **READING))
    denoised: Training = field(default_factory=lambda: NeededExperts("denoised", **LEARNING, steps=300))
    many: Training = field(default_factory=lambda: NeededExperts("denoised", **LEARNING | MANY, steps=300))
    many_noisy: Training = field(default_factory=lambda: Distillation("noisy", **IN_NOISE | MANY))


def happy_rows(bench: FaceBench) -> tuple[Row, ...]:
    """Every way to guide."""
    return (
        Row("unguided", "nothing"),
        Row("plain guider, noisy view", training=Plain("noisy"), points=SETTINGS["noisy"]),
        Row("plain guider, denoised view, constant strength", points=SETTINGS["constant"]),
        Row("PPAP: five experts, noisy view, fresh noise", training=bench.fresh, points=SETTINGS["noisy"]),
        Row("five experts, noisy view, trajectories", training=bench.noisy, points=SETTINGS["noisy"]),
        Row("five experts where needed, constant strength", training=bench.denoised, points=SETTINGS["constant"]),
        *few_rows(bench),
        Row("DPS", "dps", points=({"rho": 0.1}, {"rho": 0.25}, {"rho": 0.6})),
        Row("LGD-MC", "lgd", settings={"samples": 3}, points=({"rho": 0.2}, {"rho": 0.5}, {"rho": 1.0})),
        Row("Adam-MPGD", "adam_mpgd", points=({"mu": 0.1}, {"mu": 0.3}, {"mu": 1.0})),
        Row("best of 3, unguided", "particles", settings={"count": 3}, points=({"weight": 0.0},)),
        Row("FK steering, 4 particles", "particles", settings={"count": 4, "resample": [0.5, 10]},
            points=({"weight": 0.0, "gain": 1.0},)),
        Row("five experts where needed, best of 2", "particles", training=bench.denoised, settings={"count": 2},
            points=({"weight": 0.5, **FALLING},)),
        Row("plain guider, Adam", "adam", points=tuple({"weight": weight, "balanced": True} for weight in (0.2, 0.45, 0.9))),
        Row("five experts where needed, Adam", "adam", training=bench.denoised,
            points=tuple({"weight": weight, "balanced": True} for weight in (0.2, 0.45, 0.9))),
        Row("five experts where needed, damped by the noise level", training=bench.denoised,
            points=tuple({"weight": 0.7, "balanced": True, "damping": damping} for damping in (1.0, 4.0, 16.0))),
        Row("five experts where needed, two sub-steps", "sub-steps", training=bench.denoised, settings={"parts": 2},
            points=SETTINGS["denoised"][1:]),
        Row("five experts where needed, steps done twice, through the model", "time travel", training=bench.denoised,
            settings={"rounds": 2}, points=({**SETTINGS["through"][2], "low": 0.5, "high": 3.0},)),
        Row("plain guider, noisy view, renewed noise", "renewed noise", training=Plain("noisy"), settings=RENEWED,
            points=SETTINGS["noisy"]),
        Row("PPAP: five experts, noisy view, fresh noise, renewed noise", "renewed noise", training=bench.fresh,
            settings=RENEWED, points=SETTINGS["noisy"]),
        Row("plain guider, renewed noise", "renewed noise", settings=RENEWED, points=SETTINGS["denoised"][1:]),
        Row("five experts where needed, renewed noise", "renewed noise", training=bench.denoised, settings=RENEWED,
            points=SETTINGS["denoised"][1:]),
        Row("plain guider, renewed noise, through the model", "renewed noise", settings=RENEWED,
            points=SETTINGS["through"][2:]),
        Row("five experts where needed, renewed noise, through the model", "renewed noise", training=bench.denoised,
            settings=RENEWED, points=SETTINGS["through"][2:]),
        Row("readout head", training=bench.readout,
            points=({"weight": 0.3, "balanced": True}, {"weight": 0.45, "balanced": True}, {"weight": 0.35, **FALLING})),
        Row("FreeDoM", "freedom", settings={"recurrences": 2}, points=({"rho": 0.02}, {"rho": 0.05}, {"rho": 0.1})),
        Row("Universal Guidance", "ugd", settings={"recurrences": 1, "iterations": 2},
            points=({"rho": 0.5, "mu": 0.1}, {"rho": 1.0, "mu": 0.5}, {"rho": 4.0, "mu": 0.1})),
        Row("TFG", "tfg", settings={"iterations": 2},
            points=({"rho": 0.05, "mu": 0.05}, {"rho": 0.25, "mu": 0.05}, {"rho": 0.05, "mu": 0.25})),
        *short_rows(bench),
        *many_rows(bench),
    )


def many_rows(bench: FaceBench) -> tuple[Row, ...]:
    """Experts that learned from more faces, and from variants of them."""
    name = "five experts of many faces and their variants"
    noisy = (*SETTINGS["noisy"][1:], {"weight": 1.4, **FALLING})
    return (Row(f"{name}, noisy view", training=bench.many_noisy, points=noisy),
            Row(f"{name}, noisy view, renewed noise", "renewed noise", training=bench.many_noisy, settings=RENEWED,
                points=noisy),
            Row(f"{name}, where needed", training=bench.many, points=SETTINGS["denoised"]),
            Row(f"{name}, where needed, through the model", training=bench.many, points=SETTINGS["through"]))


def short_rows(bench: FaceBench) -> tuple[Row, ...]:
    """Guidance in few steps: one look of the guider at each, or as many looks in all as usual; settings not searched."""
    rows, places = [], {"denoised view": SETTINGS["denoised"][1], "through the model": SETTINGS["through"][2]}
    for steps in FEW_STEPS:
        looks = STEPS // steps
        rows.append(Row(f"unguided, {steps} steps", "nothing", steps=steps))
        rows += [Row(f"{name}, {place}{more}, {steps} steps", training=training, points=(setting | given,), steps=steps)
                 for place, setting in places.items()
                 for more, given in (("", {}), (f", {looks} sub-steps", {"substeps": looks}))
                 for name, training in (("plain guider", Plain()), ("five experts where needed", bench.denoised))]
    return tuple(rows)


def few_rows(bench: FaceBench) -> tuple[Row, ...]:
    """The ways to guide in the denoised view that any aim is measured with."""
    return (
        Row("plain guider, denoised view", points=SETTINGS["denoised"]),
        Row("plain guider, through the model", points=SETTINGS["through"]),
        Row("five experts where needed, denoised view", training=bench.denoised, points=SETTINGS["denoised"]),
        Row("five experts where needed, through the model", training=bench.denoised, points=SETTINGS["through"]),
        Row("MPGD", "mpgd", points=({"mu": 0.15}, {"mu": 0.4}, {"mu": 1.0})),
    )


def tables(bench: FaceBench) -> tuple[Table, ...]:
    """A table for each aim."""
    few = (Row("unguided", "nothing"), *few_rows(bench))
    return (_table(bench, "happy", happy_rows(bench)), _table(bench, "surprised", few), _table(bench, "sad", few),
            _table(bench, PERSON, few, "identity"))


def _table(bench: FaceBench, title: str, rows: tuple[Row, ...], guider: str = "expression") -> Table:
    return Table(title, guider, rows, bench.images, bench.search, STEPS, scenes=bench.unguided, cost_images=8)


def face_bench(bench: FaceBench, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Result]:
    """Results of all tables, or of the rows named "title: row"; finished parts are read from the folder.

    ValueError without the real networks, and for a name that no table has.
    """
    known = [f"{table.title}: {row.name}" for table in tables(bench) for row in table.rows]
    if unknown := {*only} - {*known}:
        raise ValueError(f"there are no faces for '{min(unknown)}': expected some of {'; '.join(known)}")
    return [result for table in tables(bench) for result in _run_table(_reduced(table, only), folder, report)]


def _reduced(table: Table, only: Sequence[str]) -> Table:
    return replace(table, rows=tuple(row for row in table.rows if not only or f"{table.title}: {row.name}" in only))


def _run_table(table: Table, folder: Path, report: Report) -> list[Result]:
    if not table.rows:
        return []
    world = load_face_world(table.task)
    table = replace(table, label=None if table.title == PERSON else world.guider.labels.index(table.title))
    unguided = unguided_faces(world, table.scenes, table.steps, folder / f"faces_{table.scenes}.safetensors", report)
    workspace = Workspace(world, folder, table.steps, partial(_prefixed, report, table.title))
    results = run_rows(table, FaceEvaluator(world, unguided, table.label), workspace)
    return [{"aim": table.title, **result} for result in results]


def _prefixed(report: Report, name: str, line: str) -> None:
    report(f"{name}: {line}")


COLUMNS = (Column("by the judge", "{score:.0%}"), Column("by the guider", "{own_score:.0%}"),
           Column("Fréchet", "{frechet:.1f}"), Column("to those that are so", "{to_wanted}"),
           Column("precision", "{precision:.2f}"), Column("recall", "{recall:.2f}"),
           Column("time, times plain", "{time_ratio:.1f}"), Column("setting", "{setting}", numeric=False))


def table(rows: Sequence[Result]) -> str:
    """Rows in Markdown, a table for each aim."""
    aims = dict.fromkeys(row["aim"] for row in rows)
    return "\n".join(_aim_table(aim, [row for row in rows if row["aim"] == aim]) for aim in aims)


def _aim_table(aim: str, rows: Sequence[Result]) -> str:
    return report.markdown((Column(f"faces: {aim}", "{row}", numeric=False), *COLUMNS), [_cells(row) for row in rows])


def _cells(row: Result) -> Result:
    distance = row["wanted_frechet"]
    return row | {"setting": setting_text(row["setting"]), "to_wanted": "" if distance is None else f"{distance:.1f}"}


def plot(rows: Sequence[Result]) -> Tensor:
    """Of the first aim, what the judge says by the Frechet distance, as a picture (1, 3, H, W) in [-1, 1]."""
    aim = rows[0]["aim"]
    points: dict[str, Points] = {row["row"]: [(row["frechet"], row["score"])] for row in rows if row["aim"] == aim}
    axes = Axes("Frechet distance to unguided faces, less is better", f"share called {aim} by the judge", log_x=True)
    return line_plot(points, f"Faces, {aim}", axes, PLOT_SIZE)
