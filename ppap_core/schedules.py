"""Which expert answers for which noise level, and how a weight changes over a window of noise levels."""
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .noise import NoiseInterval


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


def constant(sigma: float) -> float:
    """The ramp that changes nothing."""
    return 1.0


@dataclass(frozen=True)
class Ramp:
    """A factor for the weight that goes from `first` where the window opens (its high end) to `last` where it closes.

    Linear in log sigma; needs a window with two finite, positive ends. first = last = 1 changes nothing.
    """

    window: NoiseInterval
    first: float = 1.0
    last: float = 1.0

    def __post_init__(self):
        if not 0 < self.window.lo < self.window.hi < math.inf:
            raise ValueError(f"a ramp needs a window with two finite, positive ends, got {self.window.lo} and "
                             f"{self.window.hi}")

    def __call__(self, sigma: float) -> float:
        low, high = math.log(self.window.lo), math.log(self.window.hi)
        share = min(max((high - math.log(sigma)) / (high - low), 0.0), 1.0)
        return self.first + share * (self.last - self.first)
