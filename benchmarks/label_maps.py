"""The benchmark of segmentation as inference: maps found for pictures, against the exact ones."""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.priors.label_maps import (
    LABELS,
    Soft,
    cluster_guider,
    colour_clusters,
    improbability,
    joint,
    label_map,
    one_hot,
    renamed,
    share_guider,
    soft_labels,
    soft_wall,
    unexplained,
)
from examples.priors.networks import load_label_prior
from ppap_core.guidance.prior import PriorConfig, PriorObjective, best_of, renoise_and_sample, run_prior
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import clean
from ppap_core.noise import PIXEL_SIGMA_DATA
from ppap_core.rng import seeded_noise
from ppap_core.sampling import Denoiser
from ppap_core.tinyworld.loaders import load_guider
from ppap_core.tinyworld.scenes import Scenes, draw

from .evaluation import overlap

Report = Callable[[str], None]
SHAPES = len(LABELS) - 1


@dataclass(frozen=True)
class Way:
    """How a map is found by the prior."""

    weight: float = 1.0        # of the clusters; 0: the picture is not looked at
    soft: Soft = soft_labels   # which labels shall explain them
    share: float = 0.0         # of the share of the wall
    balanced: bool = False     # whether these are shares of the prior's own pull
    particles: int = 1         # maps for each picture, of which the most probable one is kept
    clean: float = 0.0         # noise level of the clean-up at the end
    named: bool = False        # whether the shape is at last called what makes the map most probable
    clusters: int = 2          # of colours
    prior: PriorConfig = PriorConfig(steps=100, sigma_max=20.0, sigma_min=0.2)


def segment(prior: Denoiser, images: Tensor, seeds: Sequence[int], way: Way) -> Tensor:
    """A label map for each picture, (B, 3, H, W) -> (B, H, W) long."""
    clusters = colour_clusters(images, way.clusters).repeat(way.particles, 1, 1)
    seeds = [seed * way.particles + i for i in range(way.particles) for seed in seeds]
    start = 0.1 * PIXEL_SIGMA_DATA * seeded_noise(seeds, (len(LABELS), *images.shape[2:])).to(images)
    terms = [Term(cluster_guider(clusters, way.soft), way.weight, normalized=way.balanced),
             Term(share_guider(), way.share, normalized=way.balanced)]
    points, _ = run_prior(PriorObjective(prior, terms), start, way.prior, seeds)
    found = label_map(renoise_and_sample(prior, points, way.clean, way.prior.sigma_min, 12, seeds))
    if way.particles > 1:
        found = most_probable(prior, found, clusters, way.particles)
    return named(prior, found) if way.named else found


def most_probable(prior: Denoiser, found: Tensor, clusters: Tensor, particles: int) -> Tensor:
    """Of a batch that is there `particles` times in a row, for each picture the map of the least -log p(map) -
    log p(clusters | map), (B, H, W)."""
    seeds = [*range(len(found) // particles)] * particles
    return best_of(found, improbability(prior, found, seeds) + unexplained(one_hot(found), clusters), particles)


def named(prior: Denoiser, found: Tensor) -> Tensor:
    """The same maps, the shape of each called what makes it most probable."""
    every = torch.cat([renamed(found, shape) for shape in range(SHAPES)])
    return best_of(every, improbability(prior, every, [*range(len(found))] * SHAPES), SHAPES)


def biggest_is_wall(images: Tensor, clusters: int) -> Tensor:
    """The biggest cluster as wall, the rest as the shape that covers most pixels of label maps, (B, H, W)."""
    found = colour_clusters(images, clusters)
    wall = F.one_hot(found.flatten(1), clusters).sum(1).argmax(1)
    return (found != wall[:, None, None]) * COMMONEST


COMMONEST = LABELS.index("ring")


def best_labels(images: Tensor, clusters: int, truth: Tensor) -> Tensor:
    """What clusters could be at best: each has the label that most of its pixels have, (B, H, W)."""
    found = colour_clusters(images, clusters)
    return joint(one_hot(truth), found).argmax(1).gather(1, found.flatten(1)).reshape(truth.shape)


def main_shape(labels: Tensor) -> Tensor:
    """The label of most pixels that are not wall, (B, H, W) -> (B,); 1 where there are none."""
    return one_hot(labels).flatten(2).sum(2)[:, 1:].argmax(1) + 1


def measures(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Share of right pixels; mean over labels of intersection over union, each over all maps; the mean over maps of that of
    object and wall, whatever its name; share of maps of the right shape."""
    a, b = one_hot(found).bool(), one_hot(truth).bool()
    ious = (a & b).sum((0, 2, 3)) / (a | b).sum((0, 2, 3)).clamp_min(1)
    return {"pixels": float((found == truth).float().mean()), "mean IoU": float(ious.mean()),
            "object and wall": float(overlap(found > 0, truth > 0).mean()),
            "shape": float((main_shape(found) == main_shape(truth)).float().mean())}


@dataclass(frozen=True)
class LabelBench:
    """Which pictures maps are found for: none that anything was trained on or chosen by."""

    scenes: range = range(3000, 3128)
    batch: int = 64


WAYS = {
    "the prior, without the picture": Way(weight=0.0),
    "the prior and clusters": Way(),
    "... named at last": Way(named=True),
    "... through the model": Way(prior=replace(Way().prior, backprop_through_model=True)),
    "... with a clean-up": Way(clean=2.0),
    "... with the share of the wall": Way(share=1.0),
    "... named at last, by 5 clusters": Way(clusters=5, named=True),
    "... named at last, clusters say nothing of shapes": Way(soft=soft_wall, named=True),
    "... the best of 4, named at last": Way(particles=4, named=True),
}


def ways(prior: Denoiser) -> dict[str, Callable[[Scenes, range], Tensor]]:
    """All rows: (scenes, their seeds) -> label maps. Best labels are read off the exact maps; the last learnt from
    such maps together with their pictures."""
    supervised = load_guider("segmentation")
    found = {
        "2 clusters, the biggest is wall": lambda scenes, seeds: biggest_is_wall(scenes.image, 2),
        "5 clusters, the biggest is wall": lambda scenes, seeds: biggest_is_wall(scenes.image, 5),
        "2 clusters, each with its best label": lambda scenes, seeds: best_labels(scenes.image, 2, scenes.segmentation),
        "5 clusters, each with its best label": lambda scenes, seeds: best_labels(scenes.image, 5, scenes.segmentation),
        "2 clusters, the biggest is wall, named by the prior":
            lambda scenes, seeds: named(prior, biggest_is_wall(scenes.image, 2))}
    for name, way in WAYS.items():
        found[name] = lambda scenes, seeds, way=way: segment(prior, scenes.image, seeds, way)
    found["a network that learnt from labelled pictures"] = lambda scenes, seeds: supervised.predict(
        scenes.image, clean(scenes.image)).argmax(1)
    return found


def label_bench(config: LabelBench, report: Report) -> list[dict]:
    """All rows, one after the other."""
    rows, prior = [], load_label_prior()
    for name, way in ways(prior).items():
        found, truth, started = [], [], time.monotonic()
        for start in range(0, len(config.scenes), config.batch):
            seeds = config.scenes[start:start + config.batch]
            scenes = draw(seeds)
            found.append(way(scenes, seeds))
            truth.append(scenes.segmentation)
        seconds = (time.monotonic() - started) / len(config.scenes)
        rows.append({"row": name, **measures(torch.cat(found), torch.cat(truth)), "seconds": seconds})
        report(f"{rows[-1]}")
    return rows


def table(rows: list[dict]) -> str:
    """In Markdown."""
    names = ["pixels", "mean IoU", "object and wall", "shape"]
    lines = ["| label maps | right pixels | mean IoU | IoU of object and wall | right shape | seconds for each |",
             "|---|" + "---:|" * 5]
    return "\n".join(lines + [f"| {row['row']} | " + " | ".join(f"{row[name]:.3f}" for name in names)
                              + f" | {row['seconds']:.2g} |" for row in rows]) + "\n"
