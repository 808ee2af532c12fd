"""The benchmark of rules: images that obey what no label says, by guided sampling and by optimisation under a prior."""
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppap_core import Guider, PriorConfig, PriorObjective, Term, optimize_images, rule_guider
from ppap_core.guiders.guider import clean
from ppap_core.tinyworld.loaders import SIZE

from . import report
from .evaluation import features
from .metrics import FeatureStats, frechet_distance
from .report import Column, Report, Row
from .tiny_world import NOISE, TinyWorld, load_world

TARGETS = {"symmetry left-right": None, "symmetry half turn": None, "brightness": 0.75, "saturation": 0.05}
METHODS = ("sampling", "guided sampling", "prior")


@dataclass(frozen=True)
class RulesBench:
    """Everything that a result depends on, besides the weights."""

    images: int = 128
    steps: int = 16            # of the sampler
    scenes: int = 20_000       # real scenes for Frechet distances
    weight: float = 0.5        # normalized, for all
    prior: PriorConfig = PriorConfig(steps=100)
    batch: int = 64


def make_images(world: TinyWorld, method: str, term: Term, seeds: Sequence[int], config: RulesBench) -> Tensor:
    """Images (B, 3, 32, 32) of the given seeds by one of METHODS."""
    if method == "prior":
        start = torch.zeros(len(seeds), 3, SIZE, SIZE, device=world.device)
        return optimize_images(PriorObjective(world.denoise, [term]), start, config.prior, seeds)[0]
    return world.sample(seeds, config.steps, [] if method == "sampling" else [term])


def aimed_rule(name: str) -> Guider:
    """A rule with its target in this benchmark."""
    guider, target = rule_guider(name), TARGETS[name]
    return guider if target is None else guider.aim(torch.full((1, 1), target))


@torch.no_grad()
def deviation(guider: Guider, images: Tensor) -> Tensor:
    """Root mean square difference between a rule's output and its target, (B,)."""
    output = guider.predict(images, clean(images))
    return (output - guider.target_for(images, output)).square().flatten(1).mean(1).sqrt()


@torch.no_grad()
def confident_share(judge: Guider, images: Tensor) -> float:
    """Share of images that show some shape clearly: to whose class a judge gives a probability above 0.9."""
    return float((judge.predict(images, clean(images)).softmax(1).amax(1) > 0.9).float().mean())


def rules_bench(config: RulesBench, report: Report) -> list[Row]:
    """A row for each rule and each method."""
    world = load_world()
    real, rows = world.evaluator(config.scenes).reference, []
    for name in TARGETS:
        for method in METHODS:
            rows.append(measured(world, name, method, config, real.stats))
            report(f"{rows[-1]}")
    return rows


def measured(world: TinyWorld, name: str, method: str, config: RulesBench, real: FeatureStats) -> Row:
    """The row of one rule and one method."""
    guider, seeds = aimed_rule(name), [NOISE + number for number in range(config.images)]
    term, started = Term(guider, config.weight, normalized=True), time.monotonic()
    images = torch.cat([make_images(world, method, term, seeds[start:start + config.batch], config)
                        for start in range(0, len(seeds), config.batch)])
    seconds = (time.monotonic() - started) / len(seeds)
    image_features = features(world.class_judge, images).cpu()
    stats = FeatureStats(image_features.shape[1]).update(image_features)
    return {"rule": name, "way": method, "off": float(deviation(guider, images).mean()), "seconds": seconds,
            "sure": confident_share(world.judges[0], images), "frechet": frechet_distance(stats, real)}


COLUMNS = (Column("rule", "{rule}", numeric=False), Column("way", "{way}", numeric=False), Column("off by", "{off:.3g}"),
           Column("clear shapes", "{sure:.0%}"), Column("Fréchet", "{frechet:.3g}"),
           Column("seconds for each", "{seconds:.2g}"))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    return report.markdown(COLUMNS, rows)
