"""Samplers that restore images from linear measurements, for comparison with guidance by a term.

They need the operator in closed form, where guidance needs a gradient only.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guiders.operators import Measurement
from ..noise import expand
from ..rng import noise_like
from ..sampling import Denoiser, sample_renewing
from .gradients import rms


@dataclass(frozen=True)
class DiffPIR:
    """Settings of DiffPIR. A share of 0 draws no noise; a strength of 0 follows the measurement alone."""

    strength: float = 1.0  # lambda: how much the prediction counts against the measurement; infinite: plain sampling
    share: float = 1.0     # zeta: share of the noise that each step draws anew, in variance


def sample_diffpir(denoise: Denoiser, measurement: Measurement, x: Tensor, sigmas: Tensor, settings: DiffPIR,
                   seeds: Sequence[int]) -> Tensor:
    """Restored images (B, C, H, W) by DiffPIR (Zhu et al. 2023, algorithm 1).

    x (B, C, H, W): noise * sigmas[0]; sigmas (steps + 1,): descending, ending in 0; seeds: one for each image. Of each
    step but the last, the prediction D becomes

        argmin |y - A z|^2 + rho |z - D|^2,   rho = strength noise^2 / sigma^2
    """
    last = float(sigmas[-2])

    def restored(x: Tensor, sigma: Tensor) -> Tensor:
        image, level = denoise(x, sigma), float(sigma[0])
        return measurement.proximal(image, settings.strength * (measurement.noise / level) ** 2) if level > last else image
    return sample_renewing(restored, x, sigmas, settings.share, seeds)


@dataclass(frozen=True)
class ImplicitPrior:
    """Settings of the stochastic ascent of Kadkhodaie & Simoncelli. A noise of 1 draws none."""

    first_step: float = 0.01  # h0: share of the way to the prediction in the first iteration; it grows to 1
    noise: float = 0.01       # beta: 1 draws no noise; below, the noise falls so much more slowly
    last_sigma: float = 0.02  # the ascent ends below this noise level
    cut: float = 1e-3         # share of the largest eigenvalue of A A^T below which nothing was measured
    most: int = 1000          # iterations at most


def sample_implicit_prior(denoise: Denoiser, measurement: Measurement, x: Tensor, settings: ImplicitPrior,
                          seeds: Sequence[int]) -> Tensor:
    """Restored images (B, C, H, W) by constrained ascent of the prior in a denoiser (Kadkhodaie & Simoncelli 2021).

    x (B, C, H, W): noise at the first noise level, around which the measurement is laid; seeds: one for each image. With
    P the projection onto what is measured and D the prediction, iteration t = 1, 2, ... is

        d = (1 - P) (D - x) + (A^+ y - P x),   sigma = rms(d),   h = h0 t / (1 + h0 (t - 1))
        x = x + h d + sqrt((1 - beta h)^2 - (1 - h)^2) sigma noise

    until sigma is below the last noise level, then the prediction of x. The method takes measurements as exact.
    """
    start = measurement.pseudo_inverse(measurement.values, settings.cut)
    x, sigma = x + start, rms(x)
    for t in range(1, settings.most + 1):
        active = sigma > settings.last_sigma
        if not bool(active.any()):
            break
        predicted = denoise(x, sigma)
        change = predicted - x + start - measurement.pseudo_inverse(measurement.operator.apply(predicted), settings.cut)
        step = settings.first_step * t / (1 + settings.first_step * (t - 1))
        amount = math.sqrt((1 - settings.noise * step) ** 2 - (1 - step) ** 2)
        moved = x + step * change + amount * expand(rms(change), x) * noise_like(x, seeds, t)
        x = torch.where(expand(active, x) > 0, moved, x)
        sigma = torch.where(active, rms(change), sigma)
    return denoise(x, sigma)
