"""Variety: batches whose images repel each other, of varied models and of such that make much the same of every seed."""
import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core import GuidanceSettings, Guider, Term, guided, rule_guider, sample_euler
from ppap_core.guiders.guider import clean
from ppap_core.guiders.variety import unlike
from ppap_core.rng import seeded_noise
from ppap_core.schedules import falling
from ppap_core.tinyworld.latents import SPACE
from ppap_core.tinyworld.loaders import condition
from ppap_core.tinyworld.scenes import CLASSES

from .costs import ratio_in_turn
from .evaluation import Evaluator
from .few_steps import FewStepWorld, load_few_step_world
from .networks import load_conditional_denoiser, load_judge
from .report import Column, Report, cached_json, markdown
from .report import Row as Result
from .tiny_world import NOISE, TinyWorld, load_world
from .training import config_hash

STAR = CLASSES.index("star")
HUES = 6  # bins of the colour of an object


@dataclass(frozen=True)
class VarietyBench:
    """Everything that a result depends on, besides the weights of the worlds."""

    batches: int = 16
    batch: int = 16
    scenes: int = 5000             # real scenes for Frechet distances; as many as images for precision and recall
    cfg: float = 4.0
    weights: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)


class Case(NamedTuple):
    """How images are made; common: share of the noise's variance that all seeds have in common."""

    model: str   # "stars" of the pixel world by cfg, or the "turbo" of latents
    steps: int
    common: float = 0.0


CASES = (Case("stars", 16), Case("stars", 8), Case("stars", 16, 0.8), Case("turbo", 4), Case("turbo", 4, 0.8))


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


@dataclass(frozen=True)
class Run:
    """One case at one weight."""

    world: TinyWorld | FewStepWorld
    bench: VarietyBench
    case: Case
    weight: float

    def term(self) -> Term:
        """A term of Variety as new nodes have it, which compares layouts."""
        sigmas = self.world.start([0], self.case.steps)[1]
        layout = replace(rule_guider("layout"), decode=SPACE.colors if isinstance(self.world, FewStepWorld) else None)
        return Term(unlike(layout), self.weight, falling(sigmas.tolist()), normalized=True)

    def sample(self, numbers: Sequence[int]) -> Tensor:
        """Images, or latents, of these numbers."""
        noise, sigmas = self.world.start([NOISE + number for number in numbers], self.case.steps)
        common = seeded_noise([NOISE - 1], noise.shape[1:]) * sigmas[0]
        start = math.sqrt(self.case.common) * common + math.sqrt(1 - self.case.common) * noise
        settings = GuidanceSettings(sigma_data=self.world.sigma_data)
        return sample_euler(guided(self.world.denoise, [self.term()], settings), start, sigmas)

    def evaluator(self) -> Evaluator:
        """Judges that see a batch at once, and as many real scenes as there are images: else a few odd ones reach all."""
        bench, stars = self.bench, {"label": STAR} if isinstance(self.world, TinyWorld) else {}
        whole = self.world.evaluator(bench.scenes, **stars)
        real = whole.reference._replace(features=whole.reference.features[:bench.batch * bench.batches])
        return replace(whole, batch=bench.batch, reference=real)

    def result(self) -> Result:
        """Measurements by networks that never guide."""
        judge, counts = load_judge("segmentation"), list[int]()

        def sample(numbers: Sequence[int], _: object) -> Tensor:
            made = self.sample(numbers)
            images = self.world.decode(made) if isinstance(self.world, FewStepWorld) else made
            counts.append(distinct(attributes(judge, images)))
            return made

        scores = self.evaluator().evaluate(sample, range(self.bench.batch * self.bench.batches))
        few, plain = range(self.bench.batch), replace(self, weight=0.0)
        ratio = ratio_in_turn(partial(self.sample, few), partial(plain.sample, few), 3)
        return {**self.case._asdict(), "weight": self.weight, "distinct": sum(counts) / len(counts), "ratio": ratio,
                "right": scores.score if self.case.model == "stars" else None,
                "precision": scores.precision, "recall": scores.recall, "frechet": scores.frechet}


def variety_bench(bench: VarietyBench, folder: Path, report: Report) -> list[Result]:
    """A row for each weight of each case; finished ones are read from the folder."""
    worlds: dict[str, TinyWorld | FewStepWorld]
    worlds = {"stars": star_world(bench.cfg), "turbo": load_few_step_world("turbo")}
    rows = []
    for case in CASES:
        for weight in bench.weights:
            name = config_hash({"bench": str(replace(bench, weights=())), "case": str(case), "weight": weight})
            rows.append(cached_json(folder / f"{name}.json", Run(worlds[case.model], bench, case, weight).result))
            report(f"{rows[-1]}")
    return rows


COLUMNS = (Column("model", "{model}", numeric=False), Column("steps", "{steps}"), Column("common noise", "{common:.0%}"),
           Column("weight", "{weight:g}"), Column("colours and places, of 24, in each batch", "{distinct:.1f}"),
           Column("recall", "{recall:.2f}"), Column("precision", "{precision:.2f}"), Column("stars, by a judge", "{stars}"),
           Column("Fréchet", "{frechet:.3g}"), Column("time, times plain", "{ratio:.2f}"))


def table(rows: Sequence[Result]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, [row | {"stars": "" if row["right"] is None else f"{row['right']:.0%}"} for row in rows])
