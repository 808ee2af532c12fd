"""The best of several images by several terms, whose energies have different units."""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from .gradients import Prediction, energy_alone
from .prior import repeat_term
from .terms import Term

ROUNDING = 1e-6  # spread of energies over their mean, or over 1 if that is larger, below which they are equal


def standings(energies: Tensor, weights: Sequence[float]) -> Tensor:
    """How much better than their mean candidates are, in standard deviations: (T, ..., N) -> (..., N), higher is better.

    Each of T terms counts in the spread of its own energies among the N candidates, so that units do not matter, and with
    its share of the weights. By one term the order is that of its energy.

    energies: lower is better; candidates whose energy is not finite are last, at -inf. weights: one for each term; a
    negative one prefers high energies. Without a spread, or with weights of 0 only, all stand at 0.
    """
    finite = energies.isfinite()
    count = finite.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(finite, energies, 0).sum(-1, keepdim=True) / count
    gain = torch.where(finite, mean - energies, 0)
    spread = (gain.square().sum(-1, keepdim=True) / count).sqrt()
    equal = spread <= ROUNDING * mean.abs().clamp_min(1)
    deviations = torch.where(equal, 0, gain / torch.where(equal, 1, spread))
    shares = torch.tensor(weights, dtype=energies.dtype, device=energies.device)
    shares = shares / shares.abs().sum().clamp_min(torch.finfo(energies.dtype).tiny)
    return torch.einsum("t, t... -> ...", shares, deviations).masked_fill(~finite.all(0), -torch.inf)


def best_first(standing: Tensor) -> Tensor:
    """Indices (..., N) of candidates by their standing (..., N), the best first; equal ones keep their order."""
    return standing.argsort(dim=-1, descending=True, stable=True)


def judge_images(guider: Guider, images: Tensor) -> Tensor:
    """Energy (B,) of images without noise (B, 3, H, W) in [-1, 1] by a guider of any kind; no gradient is needed.

    ValueError without a target that fits.
    """
    return energy_alone(replace(guider, decode=None), images, clean(images))


@dataclass(frozen=True)
class Choice:
    """How good each of several particles of an image is, by the weights of terms: a `Standing` for `sample_particles`."""

    terms: Sequence[Term]  # of one image each, as for plain sampling
    count: int             # of particles for each image

    def __call__(self, prediction: Prediction) -> Tensor:
        guiders = [repeat_term(term, self.count).guider for term in self.terms]
        points = [prediction.x if guider.view == "noisy" else prediction.denoised for guider in guiders]
        energies = torch.stack([energy_alone(guider, point, prediction.sigma)
                                for guider, point in zip(guiders, points, strict=True)])
        return standings(energies.unflatten(1, (self.count, -1)).mT, [term.weight for term in self.terms])
