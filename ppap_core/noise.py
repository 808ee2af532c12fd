"""Noise levels: one convention, and who is responsible where.

Everywhere in the core `x = image + sigma * noise` (variance exploding, VE). sigma is the standard deviation of the noise
over the scale of the signal, without unit.
"""
import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True)
class ExpertSchedule:
    """N half-open intervals between N + 1 ascending edges (VE sigma).

    Every sigma belongs to exactly one expert: below the first edge is the first, from the last edge on is the last.
    """

    edges: tuple[float, ...]

    def __post_init__(self):
        ascending = all(a < b for a, b in pairwise(self.edges))
        if len(self.edges) < 2 or not ascending or self.edges[0] <= 0 or math.isinf(self.edges[-1]):
            raise ValueError(f"edges must be at least two ascending, positive, finite noise levels, got {self.edges}")

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: int) -> NoiseInterval:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no expert {index}: this schedule has {len(self)} (0 to {len(self) - 1})")
        return NoiseInterval(self.edges[index], self.edges[index + 1])

    def index(self, sigma: float) -> int:
        """The expert responsible for a noise level."""
        if math.isnan(sigma):
            raise ValueError("the noise level is NaN: expected a number")
        return bisect_right(self.edges[1:-1], sigma)

    @classmethod
    def log_spaced(cls, n: int, sigma_min: float, sigma_max: float) -> "ExpertSchedule":
        """N intervals of equal width in log sigma."""
        if n < 1:
            raise ValueError(f"a schedule needs at least one expert, got {n}")
        ratio = sigma_max / sigma_min
        return cls(tuple(sigma_min * ratio ** (i / n) for i in range(n)) + (sigma_max,))

    @classmethod
    def equal_shares(cls, n: int, sigma_min: float, sigma_max: float, sigmas: Sequence[float]) -> "ExpertSchedule":
        """N intervals with equal shares of the steps that a sampler takes between two noise levels.

        sigmas: of its steps, each as often as it likes. Edges lie between two of them, so that no rounding sends a step to
        the neighbour. ValueError for fewer steps than experts.
        """
        levels = sorted({float(sigma) for sigma in sigmas if sigma_min <= sigma <= sigma_max})
        if not 1 <= n <= len(levels):
            raise ValueError(f"cannot split the {len(levels)} noise levels of the steps among {n} experts: expected fewer "
                             "experts, or samples of more steps")
        inner = (i * len(levels) // n for i in range(1, n))
        return cls((sigma_min, *((levels[i - 1] * levels[i]) ** 0.5 for i in inner), sigma_max))

    @classmethod
    def from_timesteps(cls, n: int, sigmas: Sequence[float] | Tensor) -> "ExpertSchedule":
        """The paper's split: equal shares of the timesteps of a discrete schedule; sigmas ascending, (T,)."""
        values = [float(sigma) for sigma in sigmas]
        if not 1 <= n <= len(values) - 1:
            raise ValueError(f"cannot split {len(values)} timesteps among {n} experts")
        return cls(tuple(values[round(i * len(values) / n)] for i in range(n)) + (values[-1],))


def seeded(*parts: int) -> torch.Generator:
    """A generator that depends on all of these numbers, of any size."""
    value = hashlib.sha256(repr(tuple(int(part) for part in parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8], "little"))


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), in the type and place of `like`, to multiply it."""
    return sigma.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def as_seen(x: Tensor, sigma: Tensor) -> Tensor:
    """x / sqrt(1 + sigma^2): a noisy state on the paper's variance-preserving scale, (B, C, H, W).

    It is what an expert of the noisy view is trained on and judges; pixel values stay near [-1, 1] at every noise level.
    """
    return x / (1 + expand(sigma, x) ** 2).sqrt()


def flow_to_ve(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified-flow state x = (1 - t) image + t noise -> VE state x / (1 - t) and sigma = t / (1 - t). Needs t < 1."""
    if bool((t >= 1).any()):
        raise ValueError(f"a flow state at t = {float(t.max())} is pure noise and has no VE noise level: needs t < 1")
    return x / (1 - expand(t, x)), t / (1 - t)
