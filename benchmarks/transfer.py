"""Experts that travel: distilled on one model, they guide another one of the same space, for class guidance."""
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ppap_core import (
    DistillConfig,
    ExpertBank,
    ExpertSchedule,
    Guider,
    LoraSpec,
    SampleStore,
    Term,
    base_network,
    distill,
    with_experts,
)
from ppap_core.schedules import falling
from ppap_core.tinyworld.scenes import draw
from ppap_core.viz.plots import Axes, line_plot

from .evaluation import Reference, features, reference, score
from .families import FAMILIES, Family
from .metrics import FeatureStats, frechet_distance
from .networks import load_held_out_judge, load_judge
from .report import Column, Report, Row, cached_json, markdown
from .tiny_world import NOISE
from .training import config_hash

WAYS = {"in the prediction": 0.7, "through the model": 0.3}
"""Where the gradient is taken -> weight at which guidance begins to fall, as new terms of either kind do."""
NOTHING, PLAIN = "nothing", "the plain guider"
STORE_SEED = 90_000_000
SCENES, SIZE = 2048, 32  # real ones, for Frechet distances, and their sides


@dataclass(frozen=True)
class TransferBench:
    """Everything that a result depends on, besides the weights of the world."""

    images: int = 512
    batch: int = 32
    store: int = 512
    experts: int = 5
    rank: int = 8
    training: DistillConfig = DistillConfig(steps=300, batch=32, lr=2e-3)


@dataclass(frozen=True)
class Cell:
    """One measurement: a model, guided by something in one of WAYS."""

    model: str
    guide: str
    way: str


@dataclass(frozen=True, eq=False)
class TransferRun:
    """All measurements of one family of models; finished parts are read from the folder."""

    bench: TransferBench
    family: Family
    folder: Path
    report: Report

    def cells(self, only: Sequence[str] = ()) -> Iterator[Cell]:
        """What is measured. only: names of the models to guide; (): all."""
        for name in self.family.models:
            banks = [bank for bank, model in self.banks.items() if model == name or self.family.models[model].lends]
            if not only or name in only:
                yield Cell(name, NOTHING, "")
                yield from (Cell(name, guide, way) for way in WAYS for guide in (PLAIN, *banks))

    @property
    def banks(self) -> dict[str, str]:
        """Name of each bank in the table -> the model whose images its experts learned from."""
        return {f"experts of {name}": name for name in self.family.models}

    def guide(self, name: str) -> Guider:
        """A guider by its name in the table."""
        plain, space = self.family.guider, self.family.space
        if name == PLAIN:
            return replace(plain, decode=space.colors if space else None)
        return with_experts(plain, self.distilled(self.banks[name]))

    def row(self, cell: Cell) -> Row:
        """Judgements of the images of a cell."""
        name = config_hash({"family": self.family.name, **asdict(cell), "weight": WAYS.get(cell.way), **asdict(self.bench)})
        row = cached_json(self.folder / f"{name}.json", partial(self._measure, cell))
        self.report(f"{cell.model} by {cell.guide} {cell.way}: {share(row['right'])[0]:.1%}, Frechet {row['frechet']:.1f}")
        return row

    def _measure(self, cell: Cell) -> Row:
        """Whether each image shows its class, by both judges: one digit for each image."""
        real, rights = real_scenes(), []
        stats = FeatureStats(real.features.shape[1])
        for start in range(0, self.bench.images, self.bench.batch):
            images, judged = self._judged(cell, range(start, min(start + self.bench.batch, self.bench.images)))
            rights.append(judged)
            stats.update(features(real.judge, images))
        right, second = torch.cat(rights, 1).int().tolist()
        return {"family": self.family.name, **asdict(cell), "right": _digits(right), "second": _digits(second),
                "frechet": frechet_distance(stats, real.stats)}

    def _judged(self, cell: Cell, numbers: range) -> tuple[Tensor, Tensor]:
        scenes, model = draw(numbers, SIZE), self.family.models[cell.model]
        images = self.family.sample(model, [NOISE + number for number in numbers], self.terms(cell, scenes.label))
        return images, torch.stack([score(judge, images, scenes) for judge in judges()])

    def terms(self, cell: Cell, labels: Tensor) -> list[Term]:
        """What guides a cell to labels (B,)."""
        if cell.guide == NOTHING:
            return []
        sigmas, through = self.family.models[cell.model].sigmas, cell.way == "through the model"
        return [Term(self.guide(cell.guide).aim(labels), WAYS[cell.way], falling(sigmas.tolist()), normalized=True,
                     backprop_through_model=through)]

    def store(self, model: str) -> SampleStore:
        """Unguided images of a model and their trajectories."""
        store = SampleStore(self.folder / f"samples_{model.replace(' ', '_')}", {
            "model": model, "family": self.family.name, "steps": len(self.family.models[model].sigmas) - 1,
            "seed": STORE_SEED})
        store.fill(self.bench.store, partial(self.family.sample_recorded, self.family.models[model]),
                   lambda have, _: self.report(f"samples of {model}: {have} of {self.bench.store}"))
        return store

    @cache  # noqa: B019  # one run for each family lives as long as the command
    def distilled(self, model: str) -> ExpertBank:
        """Experts of the images of a model, each for an equal share of the steps."""
        store, sigmas = self.store(model), self.family.models[model].sigmas[:-1].tolist()
        schedule = ExpertSchedule.equal_shares(self.bench.experts, min(sigmas), max(sigmas), sigmas)
        lora = LoraSpec(self.bench.rank, self.bench.rank)
        bank = ExpertBank(base_network(self.family.guider), schedule, lora, space=self.family.space)
        distill(self.family.guider, bank, store, self.bench.training, self.folder / f"experts_{model.replace(' ', '_')}")
        self.report(f"experts of {model}: {bank.training_info['final_losses']}")
        return bank


@cache
def real_scenes() -> Reference:
    """Real scenes as features of the judge of classes."""
    return reference(load_judge("class"), SCENES, SIZE, torch.device("cpu"))


@cache
def judges() -> tuple[Guider, Guider]:
    """Two networks that never guide, of different architectures."""
    return load_judge("class"), load_held_out_judge("class")


def _digits(right: Sequence[int]) -> str:
    return "".join(map(str, right))


def share(digits: str) -> tuple[float, float]:
    """Share of ones, and its standard error."""
    mean = digits.count("1") / len(digits)
    return mean, (mean * (1 - mean) / len(digits)) ** 0.5


def gain(judged: Sequence[str], others: Sequence[str]) -> tuple[float, float]:
    """Difference of the shares of ones for the same scenes, as a mean over judges, and its standard error over scenes."""
    ones, other_ones = (torch.tensor([[*map(int, digits)] for digits in each]).double() for each in (judged, others))
    difference = (ones - other_ones).mean(0)
    return float(difference.mean()), float(difference.std(correction=0)) / len(difference) ** 0.5


def transfer_bench(bench: TransferBench, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Row]:
    """A row for each measurement. only: names of the models to guide; (): all."""
    runs = [TransferRun(bench, family(), folder / name, report) for name, family in FAMILIES.items()]
    return [run.row(cell) for run in runs for cell in run.cells(only)]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with a line for each model and guide, in which each way has its columns."""
    found = {(row["family"], row["model"], row["guide"], row["way"]): row for row in rows}
    lines = dict.fromkeys((row["family"], row["model"], row["guide"]) for row in rows)
    return markdown(COLUMNS, [_line(found, *line) for line in lines])


def _line(found: dict[tuple, Row], family: str, model: str, guide: str) -> Row:
    cells: Row = {"family": family, "model": model, "guide": guide}
    for number, way in enumerate(WAYS):
        row = found.get((family, model, guide, "" if guide == NOTHING else way))
        own = found.get((family, model, f"experts of {model}", way))
        cells |= {f"{key}_{number}": text for key, text in _cells(row, own).items()}
    return cells


def _cells(row: Row | None, own: Row | None) -> dict[str, str]:
    """Cells of a measurement, beside that of the model's own experts; empty where something is not measured yet."""
    if row is None:
        return dict.fromkeys(("right", "second", "frechet", "behind"), "")
    behind = "" if own is None or row is own else _points(*gain(_judged(row), _judged(own)), "+")
    return {"right": _points(*share(row["right"])), "second": _points(*share(row["second"])),
            "frechet": f"{row['frechet']:.1f}", "behind": behind}


def _judged(row: Row) -> list[str]:
    return [row["right"], row["second"]]


def _points(mean: float, error: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


COLUMNS = (Column("space", "{family}", numeric=False), Column("guided", "{model}", numeric=False),
           Column("by", "{guide}", numeric=False),
           *(column for number, way in enumerate(WAYS) for column in (
               Column(f"{way}: right, %", f"{{right_{number}}}"), Column("second judge, %", f"{{second_{number}}}"),
               Column("Fréchet", f"{{frechet_{number}}}"),
               Column("against its own experts, both judges", f"{{behind_{number}}}"))))


def plot(rows: Sequence[Row]) -> Tensor:
    """Share of right classes and Fréchet distance of everything that guides, one picture for each way."""
    return torch.cat([_plot_of([row for row in rows if row["way"] == way], way) for way in WAYS], dim=2)


def _plot_of(rows: Sequence[Row], way: str) -> Tensor:
    points = {f"{row['model']} by {row['guide']}": [(row["frechet"], share(row["right"])[0])] for row in rows}
    axes = Axes("Frechet distance, less is better", "right class", log_x=True)
    return line_plot(points, f"Experts of one model guide another, {way}", axes, (460, 900))
