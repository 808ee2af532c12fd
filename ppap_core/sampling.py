"""Denoisers and the two plain samplers that the sample store, the tests and the benchmark use."""
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .noise import expand

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), sigma (B,)) -> denoised (B, C, H, W)"""


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels of Karras et al. (2022), eq. 5: descending, ending in 0, (steps + 1,) float32."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)]).float()


def sample_euler(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Euler steps along dx/dsigma = (x - D) / sigma. x = noise * sigmas[0]; sigmas descending, ending in 0."""
    for sigma, following in pairwise(sigmas.tolist()):
        denoised = denoise(x, x.new_full((len(x),), sigma))
        x = denoised + (x - denoised) * (following / sigma)
    return x


def sample_heun(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """Algorithm 1 of Karras et al. (2022), deterministic: two evaluations a step but for the last."""
    for sigma, following in pairwise(sigmas.tolist()):
        batch = x.new_full((len(x),), sigma)
        slope = (x - denoise(x, batch)) / expand(batch, x)
        ahead = x + slope * (following - sigma)
        if following > 0:
            batch = x.new_full((len(x),), following)
            slope = (slope + (ahead - denoise(ahead, batch)) / expand(batch, x)) / 2
            ahead = x + slope * (following - sigma)
        x = ahead
    return x
