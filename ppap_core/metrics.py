"""Numbers that say how good a set of images is."""
import torch
from torch import Tensor


class FeatureStats:
    """Running mean and covariance of features (n, d), in float64."""

    def __init__(self, width: int):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def update(self, features: Tensor) -> "FeatureStats":
        """Take in features (n, d)."""
        features = features.detach().cpu().double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features
        return self

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Take in all that another has seen."""
        self.count += other.count
        self.sum += other.sum
        self.outer += other.outer
        return self

    @property
    def mean(self) -> Tensor:
        """(d,)"""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(d, d), unbiased. ValueError below two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two features, got {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of the Gaussians through both sets (Heusel et al. 2017)."""
    root = _root(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    trace = torch.trace(a.covariance) + torch.trace(b.covariance)
    return float((a.mean - b.mean).square().sum() + trace - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
