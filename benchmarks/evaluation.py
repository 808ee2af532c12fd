"""How well images meet their scenes, by networks that never guide, and how far they are from real scenes."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ppap_core import Guider, base_network
from ppap_core.guiders.guider import clean
from ppap_core.tinyworld.scenes import Scenes, draw, truth

from .metrics import FeatureStats, frechet_distance, precision_recall
from .world import Wanted

Sampler = Callable[[Sequence[int], Wanted], Tensor]
"""(numbers of scenes, the scenes or what else is wanted) -> an image (B, C, H, W) for each"""

MEASURES = {"class": "right class", "depth": "depth error", "segmentation": "mean IoU"}
"""What `score` measures of each task."""

LESS_IS_BETTER = ("depth",)


@torch.no_grad()
def score(judge: Guider, images: Tensor, scenes: Scenes) -> Tensor:
    """How well images meet their scenes by a judge of one task, (B,).

    For the class 1 or 0, for the depth the mean absolute error, for the segmentation the mean intersection over union of
    wall and object.
    """
    output = judge.predict(images, clean(images))
    if judge.task == "class":
        return (output.argmax(1) == scenes.label).float()
    if judge.task == "depth":
        return (output - scenes.depth).abs().flatten(1).mean(1)
    return overlap(output.argmax(1) > 0, scenes.segmentation > 0)


def overlap(region: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union of masks (B, H, W), as the mean of that of the object and that of the wall, (B,)."""
    return (_iou(region, wanted) + _iou(~region, ~wanted)) / 2


def _iou(a: Tensor, b: Tensor) -> Tensor:
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1).clamp_min(1)


@torch.no_grad()
def features(judge: Guider, images: Tensor) -> Tensor:
    """A judge's features of images before its head, (B, d)."""
    return hidden_features(base_network(judge), judge.preprocess(images))


def hidden_features(net: nn.Module, images: Tensor) -> Tensor:
    """Features before the head of a tiny network for its own input images, (B, d)."""
    return cast(Any, net).features(images)


class Reference(NamedTuple):
    """Real scenes that nothing was trained on, as features of the judge of classes."""

    judge: Guider
    stats: FeatureStats
    features: Tensor  # (n, d) of the first scenes, for precision and recall


def reference(judge: Guider, count: int, size: int, device: torch.device, kept: int = 5000,
              label: int | None = None) -> Reference:
    """Statistics of the first `count` scenes of `size` pixels, of all classes or of one.

    kept: how many of their features are kept one by one.
    label: the class of all scenes; None: each scene has its own.
    """
    parts = [features(judge, draw(range(start, min(start + 256, count)), size, label).image.to(device)).cpu()
             for start in range(0, count, 256)]
    stats = FeatureStats(parts[0].shape[1])
    for part in parts:
        stats.update(part)
    return Reference(judge, stats, torch.cat(parts)[:kept])


@dataclass(frozen=True)
class Scores:
    """Measurements of one method at one setting, as means over its images."""

    images: int
    score: float          # by the first judge, as `score` defines it
    second_score: float   # by the held-out judge
    own_score: float      # by the guider itself: a gain that the judges do not share is one that only the guider sees
    energy: float         # of the plain guider
    frechet: float        # Frechet distance to real scenes
    precision: float
    recall: float


@dataclass(frozen=True)
class Evaluator:
    """Samples an image for each scene and judges it.

    judges: the first one, and the held-out one by which nothing is chosen.
    guider: the plain guider of the task.
    label: the class of all scenes; None: each scene has its own.
    batch: images that are sampled at once.
    """

    judges: tuple[Guider, Guider]
    guider: Guider
    reference: Reference
    device: torch.device
    label: int | None = None
    batch: int = 64

    def evaluate(self, sample: Sampler, numbers: range) -> Scores:
        """Scores of the images that are sampled for the scenes of these numbers."""
        starts = range(0, len(numbers), self.batch)
        parts = [self._judge(sample, numbers[start:start + self.batch]) for start in starts]
        score, second_score, own_score, energy = torch.cat([part for part, _ in parts], 1).mean(1).tolist()
        image_features = torch.cat([part for _, part in parts])
        stats = FeatureStats(image_features.shape[1]).update(image_features)
        precision, recall = precision_recall(image_features, self.reference.features)
        return Scores(len(numbers), score, second_score, own_score, energy, frechet_distance(stats, self.reference.stats),
                      precision, recall)

    def _judge(self, sample: Sampler, numbers: range) -> tuple[Tensor, Tensor]:
        scenes = draw(numbers, label=self.label).to(self.device)
        images = sample(numbers, scenes)
        with torch.no_grad():
            energy = self.guider.aim(truth(scenes, self.guider.task)).energy(images, clean(images))
        scores = [score(judge, images, scenes) for judge in (*self.judges, self.guider)]
        return torch.stack([*scores, energy.float()]).cpu(), features(self.reference.judge, images).cpu()
