"""Restoration of faces from measurements: a hole, a smaller image, a blurred one, each with noise.

The true faces are samples of the diffusion model itself, so that every method has the right prior; the noise that methods
start from is of other seeds.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ppap_core import sample_euler
from ppap_core.guiders.operators import Blur, Downscale, LinearOperator, Mask, Measurement
from ppap_core.rng import seeded_noise
from ppap_core.viz.drawing import contact_sheet

from .costs import ratio_in_turn
from .face_world import SHAPE, FaceWorld, load_face_world, within_range
from .perceptual import compare
from .report import Column, Report, Row, cached_json, markdown
from .restorers import METHODS, Case, Setting
from .training import config_hash

TRUTH, MEASURED, SEARCHED = 700_000_000, 800_000_000, 10_000  # seeds of faces and of noise; the first face of a search
BATCH = 32
SHOWN = 4  # faces of each operator in the picture


@dataclass(frozen=True)
class RestorationBench:
    """Everything that a result depends on, besides the methods and the networks."""

    images: int = 64
    searched: int = 16
    steps: int = 25
    noise: float = 0.05  # standard deviation, for images in [-1, 1]


def hole() -> Tensor:
    """The pixels that inpainting is given: all but the middle quarter."""
    kept = torch.ones(1, *SHAPE)
    kept[..., 10:30, 10:30] = 0
    return kept


OPERATORS: dict[str, LinearOperator] = {"hole": Mask(hole()), "a quarter of the size": Downscale(4), "blur": Blur(1.5)}
"""What is measured, by the name of its columns."""


@dataclass(frozen=True)
class Restoration:
    """The restoration of one measurement by one method."""

    bench: RestorationBench
    world: FaceWorld
    operator: str
    method: str
    folder: Path

    def result(self) -> Row:
        """Scores at the setting with the best PSNR of those searched, and the search."""
        points = METHODS[self.method].points
        searched = [self.measured(point, SEARCHED, self.bench.searched) for point in points] if len(points) > 1 else []
        best = max(searched, key=lambda score: score["psnr"])["setting"] if searched else points[0]
        return {**self.measured(best, 0, self.bench.images), "searched": searched}

    def measured(self, setting: Setting, first: int, count: int) -> Row:
        """Scores of so many faces from the first on."""
        name = config_hash({"operator": self.operator, "method": self.method, "steps": self.bench.steps,
                            "noise": self.bench.noise, "first": first, "count": count, **setting})
        return cached_json(self.folder / f"{name}.json", partial(self._measure, setting, range(first, first + count)))

    def _measure(self, setting: Setting, numbers: Sequence[int]) -> Row:
        scores = []
        for start in range(0, len(numbers), BATCH):
            part = numbers[start:start + BATCH]
            scores.append(compare(METHODS[self.method].sample(self.case(part), setting), self.faces(part)))
        psnr, distance = torch.cat(scores, dim=1).mean(1).tolist()
        return {"setting": dict(setting), "psnr": psnr, "perceptual": distance}

    def faces(self, numbers: Sequence[int]) -> Tensor:
        """True faces (B, 1, 40, 40) in [-1, 1]."""
        return true_faces(self.world, tuple(numbers), self.bench.steps)

    def case(self, numbers: Sequence[int]) -> Case:
        """The measurements of faces, and the start of their restoration."""
        faces, operator = self.faces(numbers), OPERATORS[self.operator]
        noise = seeded_noise([MEASURED + number for number in numbers], SHAPE)
        values = operator.apply(faces)
        noise = operator.on_gram(noise[..., :values.shape[-2], :values.shape[-1]], torch.sign)  # where it measured
        seeds = list(numbers)
        return Case(self.world.denoise, Measurement(operator, values + self.bench.noise * noise, self.bench.noise),
                    *self.world.start(seeds, self.bench.steps), seeds)

    def costs(self, setting: Setting) -> Row:
        """Time over that of plain sampling, on few faces."""
        case = self.case(range(SHOWN))
        return {"time_ratio": ratio_in_turn(lambda: METHODS[self.method].sample(case, setting),
                                            lambda: sample_euler(case.denoise, case.x, case.sigmas), 3)}


@cache
def true_faces(world: FaceWorld, numbers: tuple[int, ...], steps: int) -> Tensor:
    """Samples of the model, (B, 1, 40, 40) in [-1, 1]."""
    return within_range(world.sample([TRUTH + number for number in numbers], steps))


def restoration_bench(bench: RestorationBench, folder: Path, report: Report) -> list[Row]:
    """A row for each method; finished parts are read from the folder. ValueError without the real networks."""
    world = load_face_world()
    return [_row(bench, world, method, folder, report) for method in METHODS]


def _row(bench: RestorationBench, world: FaceWorld, method: str, folder: Path, report: Report) -> Row:
    results = {}
    for operator in OPERATORS:
        run = Restoration(bench, world, operator, method, folder)
        results[operator] = run.result()
        report(f"{method}, {operator}: {results[operator]}")
    setting = results[operator]["setting"]
    name = config_hash({"method": method, "steps": bench.steps, **setting})
    return {"row": method, "measured": results, **cached_json(folder / f"time_{name}.json", partial(run.costs, setting))}


SCORES = (("PSNR", "psnr", ".1f"), ("perceptual distance", "perceptual", ".2f"))
COLUMNS = (Column("method", "{row}", numeric=False),
           *(Column(f"{operator}: {heading}", f"{{measured[{operator}][{score}]:{digits}}}") for operator in OPERATORS
             for heading, score, digits in SCORES),
           Column("time, times plain", "{time_ratio:.2f}"), Column("settings", "{settings}", numeric=False))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, [row | {"settings": "; ".join(_words(result["setting"]) for result in row["measured"].values())}
                              for row in rows])


def _words(setting: Setting) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def sheet(rows: Sequence[Row]) -> Tensor:
    """Some faces for each operator: the truth, what was measured, and what each method made of it, (1, 3, H, W)."""
    world = load_face_world()
    parts = [_pictures(Restoration(RestorationBench(), world, operator, "", Path()), rows) for operator in OPERATORS]
    pictures = {name: torch.cat([part[name] for part in parts]).clamp(-1, 1).expand(-1, 3, -1, -1) for name in parts[0]}
    return contact_sheet(pictures, columns=SHOWN * len(OPERATORS))


def _pictures(run: Restoration, rows: Sequence[Row]) -> dict[str, Tensor]:
    case = run.case(range(SHOWN))
    restored = {row["row"]: METHODS[row["row"]].sample(case, row["measured"][run.operator]["setting"]) for row in rows}
    return {"truth": run.faces(range(SHOWN)), "measured": F.interpolate(case.measurement.values, SHAPE[-2:]), **restored}
