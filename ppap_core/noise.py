"""Noise levels and states of diffusion, in one convention.

Everywhere in the core `x = image + sigma * noise` (variance exploding, VE). sigma is the standard deviation of the noise
over the scale of the signal, without unit.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

PIXEL_SIGMA_DATA = 0.5  # standard deviation of natural images with pixels in [-1, 1]
PURE_NOISE = 100.0      # sigma that is treated as pure noise; a flow starts at an infinite one


@dataclass(frozen=True)
class NoiseInterval:
    """Noise levels lo <= sigma < hi (VE sigma)."""

    lo: float = 0.0
    hi: float = math.inf

    def __post_init__(self):
        if not 0 <= self.lo <= self.hi:
            raise ValueError(f"a noise interval needs 0 <= lo <= hi, got {self.lo} and {self.hi}")

    def __contains__(self, sigma: float) -> bool:
        return self.lo <= sigma < self.hi

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n log-uniform noise levels inside the interval, (n,) float32. ValueError unless lo > 0 and hi is finite."""
        if self.lo <= 0 or math.isinf(self.hi):
            raise ValueError(f"cannot draw noise levels from {self}: lo must be above 0 and hi finite")
        share = torch.rand(n, generator=generator, dtype=torch.float64)
        sigma = (self.lo * (share * math.log(self.hi / self.lo)).exp()).float()
        return sigma.clamp(*self._float32_ends())  # rounding to float32 must not leave the interval

    def _float32_ends(self) -> tuple[float, float]:
        low, high = torch.tensor([self.lo, self.hi], dtype=torch.float32)
        if float(low) < self.lo:
            low = low.nextafter(torch.tensor(math.inf))
        if float(high) >= self.hi:
            high = high.nextafter(torch.tensor(0.0))
        return float(low), float(high)


EVERYWHERE = NoiseInterval()


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1, 1), in the type and on the device of `like` (B, C, H, W), so that they multiply."""
    return sigma.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def to_vp(x: Tensor, sigma: Tensor) -> Tensor:
    """Noisy state (B, C, H, W) at sigma (B,) on the variance-preserving scale of Go et al. (2023): x / sqrt(1 + sigma^2).

    Guiders of the noisy view are trained on it and judge it; pixel values stay near [-1, 1] at every noise level. sigma 0
    changes nothing.
    """
    return x / (1 + expand(sigma, x) ** 2).sqrt()


def from_vp(x: Tensor, sigma: Tensor) -> Tensor:
    """Undo `to_vp`: the VE state (B, C, H, W) at sigma (B,) of one on the variance-preserving scale."""
    return x * (1 + expand(sigma, x) ** 2).sqrt()


def flow_to_ve(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """VE state and noise level of a rectified-flow state x = (1 - t) image + t noise: x / (1 - t), sigma = t / (1 - t).

    x (B, C, H, W), t (B,); t = 0 changes nothing. ValueError for t = 1, which is pure noise.
    """
    if bool((t >= 1).any()):
        raise ValueError(f"a flow state at t = {float(t.max())} is pure noise and has no VE noise level: needs t < 1")
    return x / (1 - expand(t, x)), t / (1 - t)


