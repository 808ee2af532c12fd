"""Denoisers, a schedule of noise levels, and three plain samplers."""
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .noise import expand
from .rng import noise_like

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), sigma (B,)) -> expected clean image (B, C, H, W)"""


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels of Karras et al. (2022), eq. 5: descending from sigma_max to sigma_min, then 0; (steps + 1,) float32.

    rho: how much the levels crowd at the low end; 1 spaces them evenly.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)]).float()


def sample_euler(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Samples (B, C, H, W) by Euler steps along dx/dsigma = (x - D) / sigma (Karras et al. 2022).

    x (B, C, H, W): noise * sigmas[0]; sigmas (steps + 1,): descending, ending in 0.
    """
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        denoised = denoise(x, x.new_full((len(x),), sigma))
        x = denoised + (x - denoised) * (next_sigma / sigma)
    return x


def sample_heun(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Samples (B, C, H, W) by Heun's method, algorithm 1 of Karras et al. (2022): two predictions a step, one in the last.

    x (B, C, H, W): noise * sigmas[0]; sigmas (steps + 1,): descending, ending in 0.
    """
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        batch = x.new_full((len(x),), sigma)
        slope = (x - denoise(x, batch)) / expand(batch, x)
        ahead = x + slope * (next_sigma - sigma)
        if next_sigma > 0:
            batch = x.new_full((len(x),), next_sigma)
            slope = (slope + (ahead - denoise(ahead, batch)) / expand(batch, x)) / 2
            ahead = x + slope * (next_sigma - sigma)
        x = ahead
    return x


def sample_renewing(denoise: Denoiser, x: Tensor, sigmas: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
    """Samples (B, C, H, W) by Euler steps that draw a share of the noise anew, as DiffPIR does (Zhu et al. 2023).

    x (B, C, H, W): noise * sigmas[0]; sigmas (steps + 1,): descending, ending in 0. share: of the variance; 0 are Euler's
    steps. seeds: one for each image, which depends on its own alone.
    """
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, x.new_full((len(x),), sigma))
        x = denoised + (x - denoised) * (math.sqrt(1 - share) * next_sigma / sigma)
        if share and next_sigma:
            x = x + math.sqrt(share) * next_sigma * noise_like(x, seeds, step)
    return x
