"""Segmentation as inference (Graikos et al. 2022): a diffusion model of label maps, and guiders that tie a map to a picture.

The picture is cut into clusters of colour. A label map explains them when a pixel's label tells its cluster; which label
maps are likely, the diffusion model knows. No model has ever seen a picture together with its map.
"""
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppap_core import Denoiser, Guider, Preprocess
from ppap_core.noise import expand
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld.loaders import LABELS as LABELS_OF_TASKS

ToProbabilities = Callable[[Tensor], Tensor]
"""points (B, 9, H, W) -> probabilities of L labels (B, L, H, W)"""

LABELS = LABELS_OF_TASKS["segmentation"]
MEAN_WALL, MEAN_SHAPE = 0.84, 0.02  # mean fractions of the wall and of each shape in the maps of scenes
SCALE = 2.75                        # of one-hot maps around these means, so that their std is PIXEL_SIGMA_DATA
LABEL_TEMPERATURE = 0.2             # of the softmax over labels; a presence is 0 or 1 in a one-hot map


def one_hot(segmentation: Tensor) -> Tensor:
    """Label maps (B, H, W) long as one-hot maps (B, 9, H, W)."""
    return F.one_hot(segmentation, len(LABELS)).movedim(-1, 1).float()


def to_points(segmentation: Tensor) -> Tensor:
    """Label maps (B, H, W) long as the model diffuses them: one-hot, centred and scaled, (B, 9, H, W)."""
    maps = one_hot(segmentation)
    return SCALE * (maps - _mean_fractions(maps))


def presence(points: Tensor) -> Tensor:
    """Points (B, 9, H, W) as the one-hot maps that they stand for, with values near 0 and 1."""
    return points / SCALE + _mean_fractions(points)


def label_map(points: Tensor) -> Tensor:
    """The most present label of each pixel, (B, 9, H, W) -> (B, H, W) long."""
    return presence(points).argmax(1)


def soft_labels(points: Tensor) -> Tensor:
    """Probabilities of the labels of each pixel, (B, 9, H, W)."""
    return (presence(points) / LABEL_TEMPERATURE).softmax(1)


def soft_wall(points: Tensor) -> Tensor:
    """Probabilities of wall and of any shape by the presence of the wall alone, (B, 2, H, W): shapes are left open."""
    wall = ((2 * presence(points)[:, :1] - 1) / LABEL_TEMPERATURE).sigmoid()
    return torch.cat([wall, 1 - wall], dim=1)


def _mean_fractions(like: Tensor) -> Tensor:
    fractions = torch.full((1, len(LABELS), 1, 1), MEAN_SHAPE)
    fractions[:, 0] = MEAN_WALL
    return fractions.to(like)


def color_clusters(images: Tensor, count: int, steps: int = 20) -> Tensor:
    """The cluster of each pixel by k-means on the colours, (B, 3, H, W) -> (B, H, W) long.

    Deterministic: the first centre is the pixel farthest from the mean, each further one that farthest from all centres.
    """
    pixels = images.flatten(2).mT
    centres, batch = pixels.mean(1, keepdim=True), torch.arange(len(images), device=images.device)
    for step in range(count):
        farthest = pixels[batch, torch.cdist(pixels, centres).amin(2).argmax(1)][:, None]
        centres = torch.cat([centres, farthest], dim=1) if step else farthest
    for _ in range(steps):
        members = F.one_hot(torch.cdist(pixels, centres).argmin(2), count).to(pixels)
        sizes = members.sum(1)[..., None]
        centres = torch.where(sizes > 0, members.mT @ pixels / sizes.clamp_min(1), centres)
    return torch.cdist(pixels, centres).argmin(2).reshape(-1, *images.shape[2:])


def entropy(fractions: Tensor) -> Tensor:
    """Entropy in nats of fractions (B, ...) that sum to 1, (B,)."""
    return torch.special.entr(fractions).flatten(1).sum(1)


def joint(labels: Tensor, clusters: Tensor) -> Tensor:
    """Fractions of the pixels by label and cluster, of probabilities (B, L, H, W) and long (B, H, W), (B, L, K)."""
    members = F.one_hot(clusters.flatten(1), int(clusters.max()) + 1).to(labels)
    return labels.flatten(2) @ members / members.shape[1]


def cluster_nll(labels: Tensor, clusters: Tensor) -> Tensor:
    """-log p(clusters | labels) of a picture in nats, if every label has colours of its own, whatever they are, (B,).

    The conditional entropy of the clusters, summed over pixels. A raw term of it at weight 1 leads to the most probable
    label map.

    labels: probabilities (B, L, H, W).
    clusters: (B, H, W) long.
    """
    fractions = joint(labels, clusters)
    return clusters[0].numel() * (entropy(fractions) - entropy(fractions.sum(2)))


def wall_divergence(labels: Tensor) -> Tensor:
    """KL(observed || mean wall fraction) over pixels in nats, of probabilities (B, L, H, W), (B,).

    The paper's prior over labels, as far as it holds here: each map has one shape, and all shapes are as frequent.
    """
    wall = labels[:, 0].flatten(1).mean(1).clamp(1e-6, 1 - 1e-6)
    divergence = wall * (wall / MEAN_WALL).log() + (1 - wall) * ((1 - wall) / (1 - MEAN_WALL)).log()
    return labels[0, 0].numel() * divergence


class MeasureNetwork(nn.Module):
    """A measure of soft labels in nats as a guider's network, whose energy of the task "number", half a square, it is.

    measure: (probabilities (B, L, H, W)[, clusters (B, H, W)]) -> nats (B,).
    """

    def __init__(self, to_probabilities: ToProbabilities, measure: Callable[..., Tensor]):
        super().__init__()
        self.to_probabilities, self.measure = to_probabilities, measure

    def forward(self, points: Tensor, sigma: Tensor, *clusters: Tensor) -> Tensor:
        maps = [flat.reshape(-1, *points.shape[2:]).long() for flat in clusters]
        nats = self.measure(self.to_probabilities(points), *maps)
        return (2 * (nats.clamp_min(0) + 1e-3) / points[0].numel()).sqrt()[:, None]  # a root has no slope at zero


def _identity(points: Tensor) -> Tensor:
    return points


NO_PREPROCESS = cast(Preprocess, _identity)  # points are no images: they are neither resized nor normalised


def cluster_guider(clusters: Tensor, to_probabilities: ToProbabilities = soft_labels) -> Guider:
    """A guider that judges maps by how well they explain the clusters of their pictures.

    clusters: (B, H, W) long; they take the place of a prompt.
    to_probabilities: `soft_labels`, under which two shapes may explain more than one, or `soft_wall`.
    """
    return Guider("tinyworld/clusters", MeasureNetwork(to_probabilities, cluster_nll), NO_PREPROCESS, "number",
                  target=torch.zeros(1, 1), prompt=clusters.flatten(1).float())


def wall_guider() -> Guider:
    """A guider that judges maps by how much of them is wall."""
    return Guider("tinyworld/share of the wall", MeasureNetwork(soft_wall, wall_divergence), NO_PREPROCESS, "number",
                  target=torch.zeros(1, 1))


@torch.no_grad()
def nll_bound(denoise: Denoiser, segmentation: Tensor, seeds: Sequence[int], levels: int = 12) -> Tensor:
    """An upper bound of -log p of label maps in nats, up to a constant, (B,) (Kingma et al. 2021, eq. 15).

    Sums the denoising errors at several noise levels.

    segmentation: (B, H, W) long.
    seeds: of the noise, one for each map; maps of the same seed meet the same noise, so that their bounds compare.
    """
    points, total = to_points(segmentation), torch.zeros(len(segmentation), device=segmentation.device)
    sigmas = torch.logspace(-0.5, 1.6, levels)
    for index, sigma in enumerate(sigmas.tolist()):
        noise = seeded_noise([seed * levels + index for seed in seeds], tuple(points.shape[1:])).to(points)
        level = points.new_full((len(points),), sigma)
        error = (denoise(points + sigma * noise, level) - points) / expand(level, points)
        total = total + error.square().flatten(1).sum(1)
    return total * float((sigmas[1] / sigmas[0]).log())


def relabelled(segmentation: Tensor, shape: int) -> Tensor:
    """Maps (B, H, W) with everything but the wall labelled as one shape."""
    return torch.where(segmentation > 0, shape + 1, 0)
