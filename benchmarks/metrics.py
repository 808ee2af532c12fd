"""Distances and overlaps between sets of images, by their features."""
import torch
from torch import Tensor


class FeatureStats:
    """Running mean and covariance of features (n, d), in float64."""

    def __init__(self, width: int):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def update(self, features: Tensor) -> "FeatureStats":
        """Add features (n, d)."""
        features = features.detach().cpu().double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features
        return self

    @property
    def mean(self) -> Tensor:
        """Mean of the features, (d,)."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance of the features, (d, d). ValueError below two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two features, got {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017).

    |mu_a - mu_b|^2 + Tr(A + B - 2 (A^1/2 B A^1/2)^1/2).
    """
    root = _root(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    trace = torch.trace(a.covariance) + torch.trace(b.covariance)
    return float((a.mean - b.mean).square().sum() + trace - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of generated features (n, d) against real ones (m, d) (Kynkaanniemi et al. 2019).

    A point lies among a set when it is no farther from some member than that member's k-th neighbour in the set. Precision
    is the share of generated points among the real ones: how believable images are; recall the reverse: how varied they are.
    ValueError for a set of k points or fewer.
    """
    # in float64, because distances come from dot products, which lose small ones far from zero
    generated, real = generated.double(), real.double()
    return _share_among(generated, real, k), _share_among(real, generated, k)


def _share_among(points: Tensor, cloud: Tensor, k: int, block: int = 1024) -> float:
    if len(cloud) <= k:
        raise ValueError(f"the distance to the {k}-th neighbour needs more than {k} features, got {len(cloud)}")
    # the nearest of a point is itself
    radius = torch.cat([torch.cdist(part, cloud).kthvalue(k + 1, dim=1).values for part in cloud.split(block)])
    inside = [(torch.cdist(part, cloud) <= radius).any(1) for part in points.split(block)]
    return float(torch.cat(inside).float().mean())
