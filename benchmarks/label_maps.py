"""The benchmark of segmentation as inference: label maps found for pictures, against the exact ones."""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.priors.label_maps import (
    LABELS,
    ToProbabilities,
    cluster_guider,
    cluster_nll,
    color_clusters,
    joint,
    label_map,
    nll_bound,
    one_hot,
    relabelled,
    soft_labels,
    soft_wall,
    wall_guider,
)
from examples.priors.networks import load_label_prior
from ppap_core import Denoiser, PriorConfig, PriorObjective, Term
from ppap_core.guidance.prior import best_of, renoise_and_sample, run_prior
from ppap_core.guiders.guider import clean
from ppap_core.noise import PIXEL_SIGMA_DATA
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld.loaders import load_guider
from ppap_core.tinyworld.scenes import Scenes, draw

from . import report
from .evaluation import overlap
from .report import Column, Report, Row

SHAPES = len(LABELS) - 1
COMMONEST = LABELS.index("ring")  # the shape that covers most pixels of label maps


@dataclass(frozen=True)
class Method:
    """How a map is found under the prior."""

    weight: float = 1.0          # of the clusters; 0: the picture is ignored
    to_probabilities: ToProbabilities = soft_labels  # of the labels that shall explain them
    wall_weight: float = 0.0     # of the fraction of the wall
    normalized: bool = False     # whether weights are relative to the prior's own gradient
    particles: int = 1           # maps for each picture, of which the most probable is kept
    renoise_sigma: float = 0.0   # noise level from which the result is sampled at last; 0: it is not
    relabel: bool = False        # whether the shape gets the label that makes the map most probable at last
    clusters: int = 2            # of colours
    prior: PriorConfig = PriorConfig(steps=100, sigma_max=20.0, sigma_min=0.2)


def segment(prior: Denoiser, images: Tensor, seeds: Sequence[int], method: Method) -> Tensor:
    """A label map for each picture, (B, 3, H, W) -> (B, H, W) long. seeds: one for each picture."""
    clusters = color_clusters(images, method.clusters).repeat(method.particles, 1, 1)
    seeds = [seed * method.particles + particle for particle in range(method.particles) for seed in seeds]
    start = 0.1 * PIXEL_SIGMA_DATA * seeded_noise(seeds, (len(LABELS), *images.shape[2:])).to(images)
    terms = [Term(cluster_guider(clusters, method.to_probabilities), method.weight, normalized=method.normalized),
             Term(wall_guider(), method.wall_weight, normalized=method.normalized)]
    points, _ = run_prior(PriorObjective(prior, terms), start, method.prior, seeds)
    maps = label_map(renoise_and_sample(prior, points, method.renoise_sigma, method.prior.sigma_min, 12, seeds))
    if method.particles > 1:
        maps = most_probable(prior, maps, clusters, method.particles)
    return best_label(prior, maps) if method.relabel else maps


def most_probable(prior: Denoiser, maps: Tensor, clusters: Tensor, particles: int) -> Tensor:
    """For each picture the map of least -log p(map) - log p(clusters | map), (B, H, W).

    maps, clusters: (particles * B, H, W), one round of all pictures after another.
    """
    seeds = [*range(len(maps) // particles)] * particles
    return best_of(maps, nll_bound(prior, maps, seeds) + cluster_nll(one_hot(maps), clusters), particles)


def best_label(prior: Denoiser, maps: Tensor) -> Tensor:
    """Relabel the foreground of maps (B, H, W) with the prior's likeliest shape."""
    candidates = torch.cat([relabelled(maps, shape) for shape in range(SHAPES)])
    return best_of(candidates, nll_bound(prior, candidates, [*range(len(maps))] * SHAPES), SHAPES)


def biggest_is_wall(images: Tensor, clusters: int) -> Tensor:
    """Baseline: the biggest cluster as wall, everything else as the commonest shape, (B, H, W)."""
    maps = color_clusters(images, clusters)
    wall = F.one_hot(maps.flatten(1), clusters).sum(1).argmax(1)
    return (maps != wall[:, None, None]) * COMMONEST


def best_labels(images: Tensor, clusters: int, truth: Tensor) -> Tensor:
    """Ceiling of clustering: each cluster with the true label of most of its pixels, (B, H, W)."""
    maps = color_clusters(images, clusters)
    return joint(one_hot(truth), maps).argmax(1).gather(1, maps.flatten(1)).reshape(truth.shape)


def main_shape(labels: Tensor) -> Tensor:
    """The most frequent label besides the wall, (B, H, W) -> (B,); 1 where there is none."""
    return one_hot(labels).flatten(2).sum(2)[:, 1:].argmax(1) + 1


def measures(maps: Tensor, truth: Tensor) -> dict[str, float]:
    """Measures of maps (B, H, W) against the exact ones.

    Share of right pixels; mean over labels of intersection over union, each over all maps; mean over maps of intersection
    over union of object and wall, whatever the object's label; share of maps with the right shape.
    """
    a, b = one_hot(maps).bool(), one_hot(truth).bool()
    ious = (a & b).sum((0, 2, 3)) / (a | b).sum((0, 2, 3)).clamp_min(1)
    return {"pixels": float((maps == truth).float().mean()), "mean IoU": float(ious.mean()),
            "object and wall": float(overlap(maps > 0, truth > 0).mean()),
            "shape": float((main_shape(maps) == main_shape(truth)).float().mean())}


@dataclass(frozen=True)
class LabelBench:
    """Which pictures maps are found for: none that anything was trained on or chosen by."""

    scenes: range = range(3000, 3128)
    batch: int = 64


PRIOR_METHODS = {
    "the prior, without the picture": Method(weight=0.0),
    "the prior and clusters": Method(),
    "... named at last": Method(relabel=True),
    "... through the model": Method(prior=replace(Method.prior, backprop_through_model=True)),
    "... with a clean-up": Method(renoise_sigma=2.0),
    "... with the share of the wall": Method(wall_weight=1.0),
    "... named at last, by 5 clusters": Method(clusters=5, relabel=True),
    "... named at last, clusters say nothing of shapes": Method(to_probabilities=soft_wall, relabel=True),
    "... the best of 4, named at last": Method(particles=4, relabel=True),
}

Segmenter = Callable[[Scenes, range], Tensor]
"""(scenes, their seeds) -> label maps (B, H, W)"""


def segmenters(prior: Denoiser) -> dict[str, Segmenter]:
    """All rows by name. Two take the labels of clusters from the exact maps, the last learnt from labelled pictures."""
    supervised = load_guider("segmentation")
    return {
        "2 clusters, the biggest is wall": lambda scenes, seeds: biggest_is_wall(scenes.image, 2),
        "5 clusters, the biggest is wall": lambda scenes, seeds: biggest_is_wall(scenes.image, 5),
        "2 clusters, each with its best label": lambda scenes, seeds: best_labels(scenes.image, 2, scenes.segmentation),
        "5 clusters, each with its best label": lambda scenes, seeds: best_labels(scenes.image, 5, scenes.segmentation),
        "2 clusters, the biggest is wall, named by the prior":
            lambda scenes, seeds: best_label(prior, biggest_is_wall(scenes.image, 2)),
        **{name: partial(_segment_scenes, prior, method) for name, method in PRIOR_METHODS.items()},
        "a network that learnt from labelled pictures":
            lambda scenes, seeds: supervised.predict(scenes.image, clean(scenes.image)).argmax(1)}


def _segment_scenes(prior: Denoiser, method: Method, scenes: Scenes, seeds: range) -> Tensor:
    return segment(prior, scenes.image, seeds, method)


def label_bench(config: LabelBench, report: Report) -> list[Row]:
    """All rows, one after another."""
    rows = []
    for name, segmenter in segmenters(load_label_prior()).items():
        rows.append({"row": name, **measured(segmenter, config)})
        report(f"{rows[-1]}")
    return rows


def measured(segmenter: Segmenter, config: LabelBench) -> dict[str, float]:
    """Measures of one segmenter, and its seconds for one picture."""
    batches = [config.scenes[start:start + config.batch] for start in range(0, len(config.scenes), config.batch)]
    started = time.monotonic()
    maps, truth = zip(*(_segmented(segmenter, seeds) for seeds in batches), strict=True)
    seconds = (time.monotonic() - started) / len(config.scenes)
    return {**measures(torch.cat(maps), torch.cat(truth)), "seconds": seconds}


def _segmented(segmenter: Segmenter, seeds: range) -> tuple[Tensor, Tensor]:
    scenes = draw(seeds)
    return segmenter(scenes, seeds), scenes.segmentation


COLUMNS = (Column("label maps", "{row}", numeric=False), Column("right pixels", "{pixels:.3f}"),
           Column("mean IoU", "{mean IoU:.3f}"), Column("IoU of object and wall", "{object and wall:.3f}"),
           Column("right shape", "{shape:.3f}"), Column("seconds for each", "{seconds:.2g}"))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    return report.markdown(COLUMNS, rows)
