"""Variety: batches of one class whose images repel each other, by the flow of latents and its student of few steps."""
import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core import Guider, Term, rule_guider
from ppap_core.guiders.guider import clean
from ppap_core.guiders.variety import unlike
from ppap_core.tinyworld.latents import SPACE
from ppap_core.tinyworld.scenes import CLASSES

from .costs import ratio_in_turn
from .few_steps import FewStepWorld, load_few_step_world
from .networks import load_judge
from .report import Column, Report, cached_json, markdown
from .report import Row as Result
from .tiny_world import NOISE
from .training import config_hash

STAR = CLASSES.index("star")
HUES = 6  # bins of the colour of an object


@dataclass(frozen=True)
class VarietyBench:
    """Everything that a result depends on, besides the weights of the world."""

    batches: int = 16
    batch: int = 16
    scenes: int = 4096             # real scenes for precision, recall and Frechet distances
    models: tuple[tuple[str, int], ...] = (("flow", 16), ("turbo", 4))  # with the number of steps
    weights: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.7)


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


def row(world: FewStepWorld, bench: VarietyBench, steps: int, weight: float) -> Result:
    """Measurements of one weight with one model, which is conditioned on stars."""
    evaluator = replace(world.evaluator(bench.scenes), batch=bench.batch)
    judge, counts = load_judge("segmentation"), list[int]()
    guidance = [Term(replace(unlike(rule_guider("layout")), decode=SPACE.colors), weight, normalized=True)]

    def sample(numbers: Sequence[int], _: object) -> Tensor:
        latents = world.sample([NOISE + number for number in numbers], steps, guidance)
        counts.append(distinct(attributes(judge, world.decode(latents))))
        return latents

    scores = evaluator.evaluate(sample, range(bench.batch * bench.batches))
    seeds = range(NOISE, NOISE + bench.batch)
    ratio = ratio_in_turn(partial(world.sample, seeds, steps, guidance), partial(world.sample, seeds, steps), 3)
    return {"steps": steps, "weight": weight, "distinct": sum(counts) / len(counts), "ratio": ratio, "stars": scores.score,
            "precision": scores.precision, "recall": scores.recall, "frechet": scores.frechet}


def variety_bench(bench: VarietyBench, folder: Path, report: Report) -> list[Result]:
    """A row for each weight with each model; finished ones are read from the folder."""
    rows = []
    for name, steps in bench.models:
        world = replace(load_few_step_world(name), label=STAR)
        for weight in bench.weights:
            identity = {"bench": str(replace(bench, weights=(), models=())), "model": name, "steps": steps, "weight": weight}
            result = cached_json(folder / f"{config_hash(identity)}.json", partial(row, world, bench, steps, weight))
            rows.append({"model": name, **result})
            report(f"{rows[-1]}")
    return rows


COLUMNS = (Column("model", "{model}", numeric=False), Column("steps", "{steps}"), Column("weight", "{weight:g}"),
           Column("distinct of 24, in batches of 16", "{distinct:.1f}"), Column("recall", "{recall:.2f}"),
           Column("precision", "{precision:.2f}"), Column("stars", "{stars:.0%}"), Column("Fréchet", "{frechet:.3g}"),
           Column("time, times plain", "{ratio:.2f}"))


def table(rows: Sequence[Result]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, rows)
