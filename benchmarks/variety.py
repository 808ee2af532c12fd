"""Variety: batches of one class whose images repel each other, by the conditional model of the pixel world."""
import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core import Guider, NoiseInterval, Term, rule_guider
from ppap_core.guiders.guider import clean
from ppap_core.guiders.variety import unlike
from ppap_core.noise import EVERYWHERE
from ppap_core.schedules import FALLING, Ramp, Schedule
from ppap_core.tinyworld.loaders import SIGMA_MAX, SIGMA_MIN, condition
from ppap_core.tinyworld.scenes import CLASSES

from .costs import ratio_in_turn
from .networks import load_conditional_denoiser, load_judge
from .report import Column, Report, cached_json, markdown
from .report import Row as Result
from .tiny_world import NOISE, TinyWorld, load_world
from .training import config_hash

STAR = CLASSES.index("star")
HUES = 6  # bins of the colour of an object


@dataclass(frozen=True)
class VarietyBench:
    """Everything that a result depends on, besides the weights of the world."""

    batches: int = 16
    batch: int = 16
    scenes: int = 5000             # real scenes for Frechet distances; as many as images for precision and recall
    cfg: float = 4.0
    counts: tuple[int, ...] = (16, 8)  # of steps
    weights: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)


class Attributes(NamedTuple):
    """What an image shows, (B,) each: the colour of its object by number, and the quarter that its middle lies in."""

    hue: Tensor
    quarter: Tensor


def attributes(judge: Guider, images: Tensor) -> Attributes:
    """Attributes of images (B, 3, H, W) by a judge of regions, which never guides."""
    inside = judge.predict(images, clean(images)).argmax(1) > 0
    inside = torch.nn.functional.interpolate(inside[:, None].float(), images.shape[-2:])[:, 0]
    area = inside.flatten(1).sum(1).clamp_min(1)
    colors = ((images * inside[:, None]).flatten(2).sum(2) / area[:, None] + 1) / 2
    hue = torch.tensor([int(HUES * colorsys.rgb_to_hsv(*color)[0]) % HUES for color in colors.clamp(0, 1).tolist()])
    place = torch.linspace(-1, 1, images.shape[-1])
    right = (inside * place).flatten(1).sum(1) > 0
    down = (inside * place[:, None]).flatten(1).sum(1) > 0
    return Attributes(hue, 2 * down.long() + right.long())


def distinct(found: Attributes) -> int:
    """Number of different combinations of attributes."""
    return len({*zip(found.hue.tolist(), found.quarter.tolist(), strict=True)})


def star_world(cfg: float) -> TinyWorld:
    """The pixel world with a model of stars by classifier-free guidance, which costs variety."""
    denoiser, star = load_conditional_denoiser(), condition(torch.tensor([STAR]))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        given = star.expand(len(x), -1)
        with_class, without = denoiser(x, sigma, given), denoiser(x, sigma, torch.zeros_like(given))
        return without + cfg * (with_class - without)
    return load_world().with_model(denoise)


def row(world: TinyWorld, bench: VarietyBench, steps: int, weight: float) -> Result:
    """Measurements of one weight at one number of steps."""
    count = bench.batch * bench.batches
    evaluator = world.evaluator(bench.scenes, STAR)
    real = evaluator.reference._replace(features=evaluator.reference.features[:count])  # else a few odd images reach all
    evaluator = replace(evaluator, batch=bench.batch, reference=real)
    judge, counts = load_judge("segmentation"), list[int]()
    falling = Schedule(EVERYWHERE, Ramp(NoiseInterval(SIGMA_MIN, SIGMA_MAX), *FALLING))  # as a new term has it
    guidance = [Term(unlike(rule_guider("layout")), weight, falling, normalized=True)]

    def sample(numbers: Sequence[int], _: object) -> Tensor:
        images = world.sample([NOISE + number for number in numbers], steps, guidance)
        counts.append(distinct(attributes(judge, images)))
        return images

    scores = evaluator.evaluate(sample, range(count))
    seeds = range(NOISE, NOISE + bench.batch)
    ratio = ratio_in_turn(partial(world.sample, seeds, steps, guidance), partial(world.sample, seeds, steps), 3)
    return {"steps": steps, "weight": weight, "distinct": sum(counts) / len(counts), "ratio": ratio, "stars": scores.score,
            "precision": scores.precision, "recall": scores.recall, "frechet": scores.frechet}


def variety_bench(bench: VarietyBench, folder: Path, report: Report) -> list[Result]:
    """A row for each weight at each number of steps; finished ones are read from the folder."""
    world, rows = star_world(bench.cfg), []
    for steps in bench.counts:
        for weight in bench.weights:
            name = config_hash({"bench": str(replace(bench, weights=(), counts=())), "steps": steps, "weight": weight})
            rows.append(cached_json(folder / f"{name}.json", partial(row, world, bench, steps, weight)))
            report(f"{rows[-1]}")
    return rows


COLUMNS = (Column("steps", "{steps}"), Column("weight", "{weight:g}"),
           Column("distinct of 24, in batches of 16", "{distinct:.1f}"), Column("recall", "{recall:.2f}"),
           Column("precision", "{precision:.2f}"), Column("stars", "{stars:.0%}"), Column("Fréchet", "{frechet:.3g}"),
           Column("time, times plain", "{ratio:.2f}"))


def table(rows: Sequence[Result]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, rows)
