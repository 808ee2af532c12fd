"""How well images of the tiny world meet what was wanted, by networks that never guide, and how far they are from scenes."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core.experts.bank import base_network
from ppap_core.guiders.guider import Guider, clean
from ppap_core.tinyworld.scenes import Scenes, draw, truth

from .metrics import FeatureStats, frechet_distance, precision_recall

MEASURES = {"class": "right class", "depth": "depth error", "segmentation": "mean IoU"}  # of the task: what `score` gives
LESS_IS_BETTER = ("depth",)


def score(judge: Guider, images: Tensor, scenes: Scenes) -> Tensor:
    """How well images meet their scenes, (B,): 1 or 0 for the class, mean absolute error of the depth, mean intersection
    over union of wall and object."""
    with torch.no_grad():
        answer = judge.predict(images, clean(images))
    if judge.task == "class":
        return (answer.argmax(1) == scenes.label).float()
    if judge.task == "depth":
        return (answer - scenes.depth).abs().flatten(1).mean(1)
    return overlap(answer.argmax(1) > 0, scenes.segmentation > 0)


def overlap(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over object and wall of intersection over union, of masks (B, H, W) -> (B,)."""
    ratios = [(a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1).clamp_min(1)
              for a, b in ((found, wanted), (~found, ~wanted))]
    return sum(ratios) / 2


@torch.no_grad()
def features(judge: Guider, images: Tensor) -> Tensor:
    """A judge's features of images, (B, d)."""
    return base_network(judge).features(judge.preprocess(images))


class Reference(NamedTuple):
    """Real scenes that nothing was trained on, by the features of the judge of classes."""

    judge: Guider
    stats: FeatureStats
    features: Tensor  # (n, d) of the first of them, for precision and recall


def reference(judge: Guider, count: int, size: int, device: torch.device, kept: int = 5000,
              label: int | None = None) -> Reference:
    """The first `count` scenes, of all classes or of one, as a judge sees them."""
    found = [features(judge, draw(range(start, min(start + 256, count)), size, label).image.to(device)).cpu()
             for start in range(0, count, 256)]
    stats = FeatureStats(found[0].shape[1])
    for part in found:
        stats.update(part)
    return Reference(judge, stats, torch.cat(found)[:kept])


@dataclass(frozen=True)
class Scores:
    """What is measured of one way to guide at one setting."""

    images: int
    score: float          # by the judge, as `score` has it
    second_score: float   # by the second judge
    own_score: float      # by the plain guider itself: what it gains over the judges is what only the guider sees
    energy: float         # of the plain guider at the end
    frechet: float        # Frechet distance on the judge's features
    precision: float
    recall: float


def judge_all(sample: Callable[[Sequence[int], Scenes], Tensor], seeds: range, judges: Sequence[Guider], guider: Guider,
              real: Reference, device: torch.device, batch: int = 64, label: int | None = None) -> Scores:
    """Sample one image for the scene of each seed, and judge them: judges are the judge and the second one.

    label: the class of all scenes; None: each has its own.
    """
    scores, seen = [], []
    for start in range(0, len(seeds), batch):
        part = seeds[start:start + batch]
        scenes = draw(part, label=label).to(device)
        images = sample(part, scenes)
        with torch.no_grad():
            energy = guider.aim(truth(scenes, guider.task)).energy(images, clean(images))
        scores.append(torch.stack([*(score(judge, images, scenes) for judge in (*judges, guider)), energy.float()]).cpu())
        seen.append(features(real.judge, images).cpu())
    found, stats = torch.cat(seen), FeatureStats(real.features.shape[1])
    return Scores(len(seeds), *torch.cat(scores, 1).mean(1).tolist(), frechet_distance(stats.update(found), real.stats),
                     *precision_recall(found, real.features))
