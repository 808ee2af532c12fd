"""A linear classifier from few examples: ridge regression on one-hot labels, judged by what it says of examples left out.

The regression has a closed form, and so have its predictions for examples that are left out (Allen 1974; in groups as in
Rifkin and Lippert 2007), so that its strength and its calibration cost one decomposition.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STRENGTHS = torch.logspace(-5, 1, 13, dtype=torch.float64)  # of the regularisation, in numbers of features
SCALES = torch.logspace(-1, 2.5, 141, dtype=torch.float64)  # of the logits
RARE = 0.1  # least deviation of a feature, in root mean squares of all: features that few examples have count little


@dataclass(frozen=True)
class LinearFit:
    """A linear classifier of features (D,), with what was said of each example by a fit that had not seen it."""

    weight: Tensor         # (K, D), float32
    bias: Tensor           # (K,)
    probabilities: Tensor  # (n, K), of the examples that were left out
    loss: float            # mean -log p of their classes, each class counting alike; smoothed as in calibration
    strength: float        # of the regularisation

    def logits(self, features: Tensor) -> Tensor:
        """Calibrated logits (B, K) of features (B, D)."""
        return F.linear(features, self.weight, self.bias)


def fit_linear(features: Tensor, labels: Tensor) -> LinearFit:
    """Fit a classifier in which every class counts alike, however many examples it has.

    features: (n, V, D), of each example and V - 1 altered copies of it, which are left out together with it.
    labels: (n,) long, from 0 to K - 1, each of them at least twice. Examples are left out in as many groups as the rarest
    class has; each takes its share of every class.
    Logits are scaled so that probabilities fit what was left out, with targets smoothed as in Platt 1999.
    """
    fit = _Regression(features.double(), labels)
    groups = list(_groups(labels))
    left_out = torch.stack([fit.left_out(strength, groups) for strength in STRENGTHS])
    losses = fit.losses(left_out)
    strength, scale = divmod(int(losses.argmin()), len(SCALES))
    weight, bias = fit.weights(STRENGTHS[strength])
    probabilities = (SCALES[scale] * left_out[strength]).softmax(1)
    return LinearFit((SCALES[scale] * weight).float(), (SCALES[scale] * bias).float(), probabilities.float(),
                     float(losses.min()), float(STRENGTHS[strength]))


def _groups(labels: Tensor) -> Iterator[Tensor]:
    """Yield the examples of each group, (m,) long."""
    count = int(labels.bincount().min())
    turns = torch.empty_like(labels)
    for label in labels.unique():
        turns[labels == label] = torch.arange(int((labels == label).sum())) % count
    yield from ((turns == turn).nonzero()[:, 0] for turn in range(count))


class _Regression:
    """The decomposed regression of one-hot labels on standardised features; rows of rare classes weigh more."""

    def __init__(self, features: Tensor, labels: Tensor):
        self.views, self.size, self.labels = *features.shape[1:], labels
        shares = 1 / labels.bincount()[labels].double()
        self.shares = shares / shares.sum()                                     # of the examples, (n,)
        self.root = (self.shares / self.views).sqrt().repeat_interleave(self.views)[:, None]  # of the weight of each row
        rows = features.flatten(0, 1)
        self.mean = (self.root**2 * rows).sum(0)
        deviation = (self.root**2 * (rows - self.mean) ** 2).sum(0).sqrt()
        self.deviation = deviation.clamp_min(max(RARE * float(deviation.square().mean().sqrt()), 1e-12))
        one_hot = F.one_hot(labels).double()
        self.centred = (one_hot - 1 / one_hot.shape[1]).repeat_interleave(self.views, 0)
        self.left, self.values, self.right = torch.linalg.svd(
            self.root * (rows - self.mean) / self.deviation, full_matrices=False)
        self.projected = self.left.mT @ (self.root * self.centred)

    def _shrunk(self, strength: Tensor) -> Tensor:
        return self.values**2 / (self.values**2 + strength * self.size)

    def left_out(self, strength: Tensor, groups: list[Tensor]) -> Tensor:
        """Centred predictions (n, K) for the unaltered examples, each by a regression without its group."""
        kept = self._shrunk(strength)
        missing = self.root * self.centred - self.left @ (kept[:, None] * self.projected)
        predictions = torch.empty(len(self.labels), self.centred.shape[1], dtype=torch.float64)
        for group in groups:
            rows = (group[:, None] * self.views + torch.arange(self.views)).flatten()
            left, root = self.left[rows], self.root[rows]
            hat = root * root.mT + (left * kept) @ left.mT
            wrong = torch.linalg.solve(torch.eye(len(rows), dtype=hat.dtype) - hat, missing[rows]) / root
            predictions[group] = (self.centred[rows] - wrong)[::self.views]
        return predictions

    def losses(self, left_out: Tensor) -> Tensor:
        """Mean -log p for predictions (S, n, K) at each scale, (S, len(SCALES))."""
        count, classes = left_out.shape[1:]
        targets = (F.one_hot(self.labels, classes) * count + 1) / (count + classes)
        return torch.stack([-((scale * left_out).log_softmax(2) * targets).sum(2) @ self.shares for scale in SCALES], 1)

    def weights(self, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (K, D) and biases (K,) of the regression on features as they are."""
        factors = self._shrunk(strength) / self.values.clamp_min(1e-12)
        weight = (self.right.mT @ (factors[:, None] * self.projected)).mT / self.deviation
        return weight, -weight @ self.mean
