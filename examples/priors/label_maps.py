"""Segmentation as inference (Graikos et al. 2022): a diffusion model of label maps, and what a picture says of its map.

The picture is cut into clusters of colour. A label map explains them when a pixel's label tells its cluster; which label
maps there are, the diffusion model knows. Neither has seen a picture together with its map.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppap_core.guiders.guider import Guider
from ppap_core.noise import expand
from ppap_core.rng import seeded_noise
from ppap_core.sampling import Denoiser
from ppap_core.tinyworld.loaders import LABELS as CLASS_NAMES

Soft = Callable[[Tensor], Tensor]
"""(what is diffused (B, 9, H, W)) -> probabilities (B, L, H, W)"""

LABELS = CLASS_NAMES["segmentation"]
WALL, SHAPE = 0.84, 0.02  # mean share of the wall, and of each shape, in the maps of scenes
SCALE = 2.75              # of a one-hot map around these, so that its spread is PIXEL_SIGMA_DATA: -2.3 to 0.4, and 0 to 2.7
LABEL_TEMPERATURE = 0.2                # a label this much more present is e times as probable, where a one-hot map has 1


def one_hot(segmentation: Tensor) -> Tensor:
    """(B, H, W) long -> (B, 9, H, W)."""
    return F.one_hot(segmentation, len(LABELS)).movedim(-1, 1).float()


def as_points(segmentation: Tensor) -> Tensor:
    """A label map (B, H, W) long as what is diffused, (B, 9, H, W): one-hot, around zero."""
    found = one_hot(segmentation)
    return SCALE * (found - _shares(found))


def presence(points: Tensor) -> Tensor:
    """What is diffused, as the one-hot map that it stands for, (B, 9, H, W)."""
    return points / SCALE + _shares(points)


def label_map(points: Tensor) -> Tensor:
    """The most probable label of each pixel, (B, 9, H, W) -> (B, H, W) long."""
    return presence(points).argmax(1)


def soft_labels(points: Tensor) -> Tensor:
    """Probabilities of the labels of each pixel, (B, 9, H, W)."""
    return (presence(points) / LABEL_TEMPERATURE).softmax(1)


def soft_wall(points: Tensor) -> Tensor:
    """Probabilities of wall and of any shape, (B, 2, H, W), by the presence of the wall alone: nothing is said of shapes."""
    wall = ((2 * presence(points)[:, :1] - 1) / LABEL_TEMPERATURE).sigmoid()
    return torch.cat([wall, 1 - wall], dim=1)


def _shares(like: Tensor) -> Tensor:
    shares = torch.full((1, len(LABELS), 1, 1), SHAPE)
    shares[:, 0] = WALL
    return shares.to(like)


def colour_clusters(images: Tensor, count: int, steps: int = 20) -> Tensor:
    """The cluster of each pixel by k-means on the colours, (B, 3, H, W) -> (B, H, W) long.

    It starts with the pixel that is farthest from the mean, and goes on with the one farthest from all those before: the
    same picture has the same clusters.
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


def entropy(shares: Tensor) -> Tensor:
    """In nats, of shares (B, ...) that sum to 1, (B,)."""
    return torch.special.entr(shares).flatten(1).sum(1)


def joint(labels: Tensor, clusters: Tensor) -> Tensor:
    """Shares of the pixels with each label and cluster, of probabilities (B, L, H, W) and long (B, H, W) -> (B, L, K)."""
    members = F.one_hot(clusters.flatten(1), int(clusters.max()) + 1).to(labels)
    return labels.flatten(2) @ members / members.shape[1]


def mutual_information(labels: Tensor, clusters: Tensor) -> Tensor:
    """Nats that a pixel's label tells of its cluster, probabilities (B, L, H, W) and long (B, H, W) -> (B,)."""
    shares = joint(labels, clusters)
    return entropy(shares.sum(1)) + entropy(shares.sum(2)) - entropy(shares)


def unexplained(labels: Tensor, clusters: Tensor) -> Tensor:
    """Nats of all clusters of a picture that its labels do not tell, (B,): their entropy, less the mutual information.

    It is -log p(clusters | labels) where every label has colours of its own, whatever they are: at weight 1 a raw term of it
    finds the most probable label map.
    """
    shares = joint(labels, clusters)
    return clusters[0].numel() * (entropy(shares) - entropy(shares.sum(2)))


def share_mismatch(labels: Tensor) -> Tensor:
    """Nats of all pixels by which the share of the wall is another than in label maps on the average, (B,): the prior over
    labels of the paper. It says nothing of which shape there is: of these there is one, and each as often."""
    wall = labels[:, 0].flatten(1).mean(1).clamp(1e-6, 1 - 1e-6)
    divergence = wall * (wall / WALL).log() + (1 - wall) * ((1 - wall) / (1 - WALL)).log()
    return labels[0, 0].numel() * divergence


class Nats(nn.Module):
    """A measure of soft labels in the call of a network; its half square, counted once for each value, are the nats."""

    def __init__(self, soft: Soft, measure: Callable[..., Tensor]):
        super().__init__()
        self.soft, self.measure = soft, measure

    def forward(self, points: Tensor, sigma: Tensor, *clusters: Tensor) -> Tensor:
        nats = self.measure(self.soft(points), *(each.reshape(-1, *points.shape[2:]).long() for each in clusters))
        return (2 * (nats.clamp_min(0) + 1e-3) / points[0].numel()).sqrt()[:, None]  # a root has no slope at zero


def as_it_is(points: Tensor) -> Tensor:
    """No preprocessing."""
    return points


def cluster_guider(clusters: Tensor, soft: Soft = soft_labels) -> Guider:
    """It judges maps by how well they explain clusters (B, H, W) long, which it holds for each picture as a prompt.

    soft: which labels shall explain them: all, of which two shapes may explain more than one, or wall and not wall.
    """
    return Guider("tinyworld/clusters", Nats(soft, unexplained), as_it_is, "number", target=torch.zeros(1, 1),
                  prompt=clusters.flatten(1).float())


def share_guider() -> Guider:
    """It judges maps by how much of them is wall."""
    return Guider("tinyworld/share of the wall", Nats(soft_wall, share_mismatch), as_it_is, "number",
                  target=torch.zeros(1, 1))


@torch.no_grad()
def improbability(denoise: Denoiser, segmentation: Tensor, seeds: Sequence[int], levels: int = 12) -> Tensor:
    """An upper bound of -log p of label maps (B, H, W) in nats, up to a constant, (B,): the errors of the noise at all
    levels (Kingma et al. 2021, eq. 15). Maps of the same seed meet the same noise, so that they compare."""
    points, total = as_points(segmentation), 0.0
    sigmas = torch.logspace(-0.5, 1.6, levels)
    for index, sigma in enumerate(sigmas.tolist()):
        noise = seeded_noise([seed * levels + index for seed in seeds], tuple(points.shape[1:])).to(points)
        level = points.new_full((len(points),), sigma)
        error = (denoise(points + sigma * noise, level) - points) / expand(level, points)
        total = total + error.square().flatten(1).sum(1)
    return total * float((sigmas[1] / sigmas[0]).log())


def renamed(segmentation: Tensor, shape: int) -> Tensor:
    """The same map with all that is not wall of one shape, (B, H, W)."""
    return torch.where(segmentation > 0, shape + 1, 0)
