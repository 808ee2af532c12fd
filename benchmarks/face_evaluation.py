"""How well faces are what they were to be, by networks that never guide, and how far they are from unguided faces."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ppap_core import base_network
from ppap_core.guiders.guider import clean
from ppap_core.io.files import load_tensors, save_tensors

from .evaluation import Sampler
from .face_world import FaceWorld, face_guider
from .metrics import FeatureStats, frechet_distance, precision_recall
from .real import real_networks
from .report import Report

REFERENCE_SEED = 300_000_000   # of the first unguided face
FEATURE_SCALE = 0.1            # so that distances have few digits
ENOUGH = 400                   # unguided faces of an expression to take a distance to


@dataclass(frozen=True)
class FaceScores:
    """Measurements of one method at one setting, as means over its faces."""

    images: int
    score: float      # share that is what it was to be, by a network that never guides
    own_score: float  # the same by the guider itself: a gain that the judge does not share is one that only the guider sees
    energy: float     # of the plain guider
    frechet: float    # Frechet distance to unguided faces, by features of SqueezeNet
    precision: float
    recall: float
    wanted_frechet: float | None  # the distance to those unguided faces that are what was wanted; None: to too few


class UnguidedFaces(NamedTuple):
    """What distances are taken to."""

    features: Tensor     # (n, 512)
    expressions: Tensor  # (n,), by the network that never guides, as a number among the guider's labels


@dataclass(frozen=True)
class FaceEvaluator:
    """Samples faces and judges them.

    label: the class of all faces; None: each has its own. batch: faces that are sampled at once.
    """

    world: FaceWorld
    unguided: UnguidedFaces
    label: int | None = None
    batch: int = 32

    def evaluate(self, sample: Sampler, numbers: range) -> FaceScores:
        """Scores of the faces that are sampled for these numbers."""
        starts = range(0, len(numbers), self.batch)
        parts = [self._judge(sample, numbers[start:start + self.batch]) for start in starts]
        score, own_score, energy = torch.cat([part for part, _ in parts], 1).mean(1).tolist()
        features = torch.cat([part for _, part in parts])
        precision, recall = precision_recall(features, self.unguided.features)
        frechet, wanted_frechet = (frechet_distance(_stats(features), stats) if stats else None
                                   for stats in (self.stats, self.wanted_stats))
        return FaceScores(len(numbers), score, own_score, energy, cast(float, frechet), precision, recall, wanted_frechet)

    @cached_property
    def stats(self) -> FeatureStats:
        """Statistics of unguided faces."""
        return _stats(self.unguided.features)

    @cached_property
    def wanted_stats(self) -> FeatureStats | None:
        """Statistics of the unguided faces that have the wanted expression; None where these are too few."""
        if self.label is None or self.world.subject != "expression":
            return None
        features = self.unguided.features[self.unguided.expressions == self.label]
        return _stats(features) if len(features) >= ENOUGH else None

    def _judge(self, sample: Sampler, numbers: range) -> tuple[Tensor, Tensor]:
        wanted = self.world.wanted(numbers, self.label)
        images = sample(numbers, wanted)
        with torch.no_grad():
            energy = self.world.aimed(self.world.guider, wanted).energy(images, clean(images))
        return torch.stack([*JUDGES[self.world.subject](self.world, images, wanted), energy.float()]), face_features(images)


def _stats(features: Tensor) -> FeatureStats:
    return FeatureStats(features.shape[1]).update(features)


@torch.no_grad()
def named_expression(world: FaceWorld, images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """1 or 0 for each face (B,): has it the wanted expression, by another author's network and by the guider's."""
    by_guider = world.plain_output(images).argmax(1)
    return (judged_expressions(images, world.guider.labels) == wanted).float(), (by_guider == wanted).float()


@torch.no_grad()
def judged_expressions(images: Tensor, labels: Sequence[str]) -> Tensor:
    """Number among `labels` of the expression that a network sees which never guides, (B,)."""
    judge = face_guider("emotion")
    numbers = torch.tensor([labels.index(name) for name in judge.labels])  # the authors have another order
    return numbers[judge.predict(images, clean(images)).argmax(1)]


@torch.no_grad()
def recognized(world: FaceWorld, images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """1 or 0 for each face (B,): is the wanted person the nearest, by another author's network and by the guider's.

    The other is that for age, whose features come from the recognition of persons (Savchenko 2019).
    """
    by_judge = _nearest(_person_features(images), _person_features(world.persons))
    return (by_judge == wanted).float(), (_nearest(world.plain_output(images), world.embeddings) == wanted).float()


def _nearest(features: Tensor, candidates: Tensor) -> Tensor:
    mean = candidates.mean(0)
    return (F.normalize(features - mean, dim=1) @ F.normalize(candidates - mean, dim=1).T).argmax(1)


def _person_features(images: Tensor) -> Tensor:
    real, net = real_networks(), cast(Any, base_network(face_guider("age"))).net
    view = real.resize(real.face_view(images), 224)
    return net.body(real.bytes_minus(view, 0, 0, 0)).mean((2, 3))


JUDGES: dict[str, Callable[[FaceWorld, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "expression": named_expression, "identity": recognized}
"""By the world's subject: (world, faces, what they were to be) -> whether they are, by another network and the guider's."""


@torch.no_grad()
def face_features(images: Tensor) -> Tensor:
    """Features of SqueezeNet for the view of faces, mean over space, (B, 512).

    They tell faces from worse ones: noise of 0.1 on 256 faces makes the distance from 1,024 others 32 times as large, by
    features of the network for identity twice.
    """
    real = real_networks()
    view = real.bytes_minus(real.resize(real.face_view(images), 227), 123, 117, 104)
    return FEATURE_SCALE * _squeezenet().features(view).mean((2, 3))


@cache
def _squeezenet() -> Any:
    return real_networks().squeezenet()


def unguided_faces(world: FaceWorld, count: int, steps: int, file: Path, report: Report, batch: int = 50) -> UnguidedFaces:
    """What distances are taken to, of so many faces; kept in a file."""
    if not file.exists():
        parts = []
        for start in range(0, count, batch):
            images = world.sample(range(REFERENCE_SEED + start, REFERENCE_SEED + min(start + batch, count)), steps)
            parts.append((face_features(images), judged_expressions(images, face_guider("expression").labels)))
            report(f"unguided faces: {start + batch} of {count}")
        faces = UnguidedFaces(*map(torch.cat, zip(*parts, strict=True)))
        save_tensors(file, faces._asdict(), {"count": count, "steps": steps})
    return UnguidedFaces(**load_tensors(file)[0])
