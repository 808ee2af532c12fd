"""The benchmark of rules: images that obey what no label says, by guided sampling and by the search under a prior."""
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppap_core.guidance.prior import PriorConfig, PriorObjective, optimize_images
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider, clean
from ppap_core.guiders.rules import rule_guider
from ppap_core.tinyworld.loaders import SIZE

from .evaluation import features, reference
from .metrics import FeatureStats, frechet_distance
from .tiny_world import NOISE, TinyWorld, load_world

Report = Callable[[str], None]
TARGETS = {"symmetry left-right": None, "symmetry half turn": None, "brightness": 0.75, "saturation": 0.05}


@dataclass(frozen=True)
class RulesBench:
    """Everything that a result depends on, besides the weights."""

    images: int = 128
    steps: int = 16            # of the sampler
    scenes: int = 20_000       # real ones that Frechet distances are taken to
    weight: float = 0.5        # balanced, for all
    prior: PriorConfig = PriorConfig(steps=100)


def ways(world: TinyWorld, config: RulesBench) -> dict[str, Callable[[list[int], list[Term]], Tensor]]:
    """How images of some seeds come about: (seeds, terms) -> (B, 3, 32, 32)."""
    def find(seeds: list[int], terms: list[Term]) -> Tensor:
        start = torch.zeros(len(seeds), 3, SIZE, SIZE, device=world.device)
        return optimize_images(PriorObjective(world.denoise, terms), start, config.prior, seeds)[0]
    return {"sampling": lambda seeds, terms: world.sample(seeds, config.steps),
            "guided sampling": lambda seeds, terms: world.sample(seeds, config.steps, terms),
            "prior": find}


def ruled(name: str) -> Guider:
    """A rule with its target in this benchmark."""
    guider, target = rule_guider(name), TARGETS[name]
    return guider if target is None else guider.aim(torch.full((1, 1), target))


def off(guider: Guider, images: Tensor) -> Tensor:
    """Root mean square of what a rule reads less what it shall read, (B,)."""
    with torch.no_grad():
        read = guider.predict(images, clean(images))
    return (read - guider.target.to(read)).square().flatten(1).mean(1).sqrt()


def sure(judge: Guider, images: Tensor) -> float:
    """Share of images of whose class a judge is sure, above 0.9: that show some shape clearly."""
    with torch.no_grad():
        return float((judge.predict(images, clean(images)).softmax(1).amax(1) > 0.9).float().mean())


def rules_bench(config: RulesBench, report: Report, batch: int = 64) -> list[dict]:
    """A row for each rule and each way."""
    world = load_world()
    real, rows = reference(world.class_judge, config.scenes, SIZE, world.device), []
    seeds = [NOISE + number for number in range(config.images)]
    for name in TARGETS:
        guider = ruled(name)
        for way, make in ways(world, config).items():
            started = time.monotonic()
            images = torch.cat([make(seeds[i:i + batch], [Term(guider, config.weight, normalized=True)])
                                for i in range(0, len(seeds), batch)])
            seconds = (time.monotonic() - started) / len(seeds)
            seen = features(world.class_judge, images).cpu()
            rows.append({"rule": name, "way": way, "off": float(off(guider, images).mean()), "seconds": seconds,
                         "sure": sure(world.judges[0], images),
                         "frechet": frechet_distance(FeatureStats(seen.shape[1]).update(seen), real.stats)})
            report(f"{rows[-1]}")
    return rows


def table(rows: list[dict]) -> str:
    """In Markdown."""
    lines = ["| rule | way | off by | clear shapes | Fréchet | seconds for each |", "|---|---|---:|---:|---:|---:|"]
    return "\n".join(lines + [f"| {row['rule']} | {row['way']} | {row['off']:.3g} | {row['sure']:.0%} | "
                              f"{row['frechet']:.3g} | {row['seconds']:.2g} |" for row in rows]) + "\n"
