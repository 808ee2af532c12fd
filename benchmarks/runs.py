"""Runs of tables: each row's settings are searched, the best one is measured, and every finished part is kept."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppap_core import TASKS, Guider, to_vp
from ppap_core.tinyworld.scenes import draw

from .costs import ratio_in_turn
from .evaluation import Evaluator, Sampler
from .face_evaluation import FaceEvaluator
from .methods import METHODS, Batch, Method, Setting
from .report import Report, cached_json
from .report import Row as Result
from .tables import Row, Table
from .tiny_world import NOISE, load_world
from .training import Workspace, config_hash, options
from .world import Wanted, World

SEARCHED = 1000  # the first scene of the images of a search
COST_REPEATS = 3  # how often costs are measured
COMPARED = 256   # scenes on which guiders are compared
LEVELS = tuple(0.05 * 2**index for index in range(9))  # noise levels at which guiders are compared


def run_table(table: Table, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Result]:
    """Results of a table's rows; finished parts are read from the folder, each setting of a search for itself.

    only: names of the rows to run; none: all.
    ValueError for the name of a row that the table has not.
    """
    if unknown := {*only} - table.by_name.keys():
        raise ValueError(f"the table has no row '{min(unknown)}': expected some of {'; '.join(table.by_name)}")
    world = load_world(table.task)
    workspace = Workspace(world, Path(folder), table.steps, report)
    results = run_rows(table, world.evaluator(table.scenes, table.label), workspace, only)
    if not only and table.reference:
        add_agreement(table, results, workspace)
    return results


def run_rows(table: Table, evaluator: Evaluator | FaceEvaluator, workspace: Workspace,
             only: Sequence[str] = ()) -> list[Result]:
    """Results of a table's rows in a workspace, or of those named."""
    return [RowRun(table, row, evaluator, workspace._replace(report=partial(_prefixed, workspace.report, row.name))).result()
            for row in table.rows if not only or row.name in only]


def _prefixed(report: Report, name: str, line: str) -> None:
    report(f"{name}: {line}")


@dataclass(frozen=True)
class RowRun:
    """The run of one row."""

    table: Table
    row: Row
    evaluator: Evaluator | FaceEvaluator
    workspace: Workspace

    @cached_property
    def method(self) -> Method:
        """The row's method; nothing is trained before its first image."""
        return METHODS[self.row.method](self.row, self.workspace)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that results depend on, but the setting and the scenes: it names the files of finished parts."""
        table, row = self.table, self.row
        always = {"task": table.task, "steps": table.steps, "scenes": table.scenes, "way": row.method,
                  "variant": row.ablation, "settings": row.settings, "training": options(row.training)}
        changed = {"label": table.label, "own_steps": row.steps or None,
                   "schedule": None if table.schedule == "karras" else table.schedule}
        return always | {name: value for name, value in changed.items() if value is not None}

    def result(self) -> Result:
        """The row's measurements at its best setting, its costs, and the search."""
        searched = self.search()
        best = self.best(searched)
        return {"row": self.row.name, "way": self.row.method, "training": options(self.row.training), **self.costs(best),
                **self.measured(best, self.row.first_scene, self.table.images), "searched": searched}

    def search(self) -> list[Result]:
        """Measurements at every setting; none where there is no choice."""
        points = self.row.points
        return [self.measured(point, SEARCHED, self.table.search) for point in points] if len(points) > 1 else []

    def best(self, searched: Sequence[Result]) -> Setting:
        """The setting of the best measurement, the first of equals."""
        if not searched:
            return self.row.points[0]
        sign = -1 if self.table.less_is_better else 1
        return max(searched, key=lambda result: sign * result[self.table.choose])["setting"]

    def measured(self, setting: Setting, first: int, images: int) -> Result:
        """Scores at a setting for so many scenes from the first on."""
        name = config_hash(self.identity | {**setting, "first": first, "images": images})
        return cached_json(self.workspace.folder / "measured" / f"{name}.json",
                           partial(self._measure, setting, range(first, first + images)))

    def _measure(self, setting: Setting, numbers: range) -> Result:
        scores = self.evaluator.evaluate(self.sampler(setting), numbers)
        self.workspace.report(f"{setting} {scores.score:.3f}, Frechet {scores.frechet:.1f}, {len(numbers)} images")
        return {"setting": setting, **asdict(scores)}

    def costs(self, setting: Setting) -> Result:
        """Costs of training and sampling at a setting."""
        return cached_json(self.workspace.folder / "costs" / f"{config_hash(self.identity | {**setting})}.json",
                           partial(self._costs, setting))

    def _costs(self, setting: Setting) -> Result:
        return {**self.method.costs, **cost_of(self.workspace.world, self.sampler(setting), self.table)}

    def sampler(self, setting: Setting) -> Sampler:
        """How the row makes images for scenes at a setting."""
        return partial(self._sample, setting)

    def _sample(self, setting: Setting, numbers: Sequence[int], scenes: Wanted) -> Tensor:
        seeds = [NOISE + number for number in numbers]
        noise, sigmas = self.workspace.world.start(seeds, self.row.steps or self.table.steps, self.table.schedule)
        return self.method.sample(Batch(scenes, seeds, noise, sigmas), setting)


def add_agreement(table: Table, results: Sequence[Result], workspace: Workspace) -> None:
    """Add to the results of guiders how far they are from the guider of the table's reference."""
    wanted = table.by_name[table.reference].training
    reference = wanted.make(workspace).guider
    for row, result in zip(table.rows, results, strict=True):
        if row.method == "guidance" and not row.ablation:
            name = config_hash({"task": table.task, "steps": table.steps, "of": options(row.training),
                                "with": options(wanted)})
            guider = row.training.make(workspace).guider
            result["agreement"] = cached_json(workspace.folder / "agreement" / f"{name}.json",
                                              partial(agreement, workspace.world, guider, reference))


@torch.no_grad()
def agreement(world: World, guider: Guider, reference: Guider) -> dict[str, float]:
    """Mean distance of a guider's outputs on noisy scenes from those of another guider, by noise level."""
    image = draw(range(COMPARED)).image.to(world.device)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    return {f"{level:g}": _distance(world, guider, reference, image + level * noise, image.new_full((len(image),), level))
            for level in LEVELS}


def _distance(world: World, guider: Guider, reference: Guider, x: Tensor, sigma: Tensor) -> float:
    output, wanted = (judge.predict(to_vp(x, sigma) if judge.view == "noisy" else world.denoise(x, sigma), sigma)
                      for judge in (guider, reference))
    return float(TASKS[guider.task].distance(output, wanted).mean())


def cost_of(world: World, sample: Sampler, table: Table) -> dict[str, float]:
    """Passes of the denoiser for each image, and the ratio of run times to plain sampling, alternated."""
    numbers = range(table.cost_images)
    wanted = world.wanted(numbers, table.label)
    with counted_passes(type(world.denoiser)) as passes:
        sample(numbers, wanted)
    ratio = ratio_in_turn(lambda: sample(numbers, wanted), lambda: world.sample(numbers, table.steps), COST_REPEATS)
    return {"forwards": len(passes), "backwards": sum(passes), "time_ratio": ratio}


@contextmanager
def counted_passes(kind: type) -> Iterator[list[bool]]:
    """Context manager: a list that grows with every pass of a kind of network by whether its input requires a gradient."""
    passes: list[bool] = []
    with nn.modules.module.register_module_forward_pre_hook(partial(_count, kind, passes)):
        yield passes


def _count(kind: type, passes: list[bool], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if isinstance(module, kind):
        passes.append(inputs[0].requires_grad)
