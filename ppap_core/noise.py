"""Noise levels: one convention, and who is responsible where.

Everywhere in the core `x = image + sigma * noise` (variance exploding, VE). sigma is the standard deviation of the noise
over the scale of the signal, without unit.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
        """n log-uniform noise levels inside the interval, (n,) float32. Needs lo > 0 and a finite hi."""
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
    """(B,) -> (B, 1, 1, 1), in the type and place of `like`, to multiply it."""
    return sigma.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def to_vp(x: Tensor, sigma: Tensor) -> Tensor:
    """x / sqrt(1 + sigma^2): a noisy state on the paper's variance-preserving scale, (B, C, H, W).

    It is what an expert of the noisy view is trained on and judges; pixel values stay near [-1, 1] at every noise level.
    """
    return x / (1 + expand(sigma, x) ** 2).sqrt()


def flow_to_ve(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified-flow state x = (1 - t) image + t noise -> VE state x / (1 - t) and sigma = t / (1 - t). Needs t < 1."""
    if bool((t >= 1).any()):
        raise ValueError(f"a flow state at t = {float(t.max())} is pure noise and has no VE noise level: needs t < 1")
    return x / (1 - expand(t, x)), t / (1 - t)


SIGMA_DATA = 0.5  # spread of scene pixels around zero
