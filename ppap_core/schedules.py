"""Schedules over noise levels: the intervals of experts, and where and how strongly a guidance weight acts."""
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .noise import EVERYWHERE, NoiseInterval


@dataclass(frozen=True)
class ExpertSchedule:
    """N half-open intervals of noise levels between N + 1 ascending edges (VE sigma), one for each expert.

    Every sigma belongs to exactly one expert: the first also serves levels below its interval, the last those above.
    """

    edges: tuple[float, ...]

    def __post_init__(self):
        ascending = all(a < b for a, b in pairwise(self.edges))
        if len(self.edges) < 2 or not ascending or self.edges[0] <= 0 or math.isinf(self.edges[-1]):
            raise ValueError(f"edges must be at least two ascending, positive, finite noise levels, got {self.edges}")

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __iter__(self) -> Iterator[NoiseInterval]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> NoiseInterval:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no expert {index}: this schedule has {len(self)} (0 to {len(self) - 1})")
        return NoiseInterval(self.edges[index], self.edges[index + 1])

    def index(self, sigma: float) -> int:
        """Index of the expert that serves a noise level."""
        if math.isnan(sigma):
            raise ValueError("the noise level is NaN: expected a number")
        return bisect_right(self.edges[1:-1], sigma)

    @classmethod
    def log_spaced(cls, n: int, sigma_min: float, sigma_max: float) -> "ExpertSchedule":
        """n intervals of equal width in log sigma between two noise levels. ValueError for n < 1."""
        if n < 1:
            raise ValueError(f"a schedule needs at least one expert, got {n}")
        ratio = sigma_max / sigma_min
        return cls(tuple(sigma_min * ratio ** (i / n) for i in range(n)) + (sigma_max,))

    @classmethod
    def equal_shares(cls, n: int, sigma_min: float, sigma_max: float, sigmas: Sequence[float]) -> "ExpertSchedule":
        """n intervals with equal shares of a sampler's steps between two noise levels.

        sigmas: noise levels of the steps, in any order; repeated ones count once. Edges lie between two of them, so that
        rounding never moves a step to the neighbouring interval. ValueError for fewer steps than experts.
        """
        levels = sorted({float(sigma) for sigma in sigmas if sigma_min <= sigma <= sigma_max})
        if not 1 <= n <= len(levels):
            raise ValueError(f"cannot split the {len(levels)} noise levels of the steps among {n} experts: expected fewer "
                             "experts, or samples of more steps")
        inner = (i * len(levels) // n for i in range(1, n))
        return cls((sigma_min, *((levels[i - 1] * levels[i]) ** 0.5 for i in inner), sigma_max))


def read_edges(text: str) -> tuple[float, ...]:
    """Ascending noise levels (VE sigma) from a text, separated by commas; () for an empty one. ValueError for others."""
    try:
        edges = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        edges = (math.nan,)
    if not all(0 < edge < math.inf for edge in edges) or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"'{text}' are no edges between experts: expected ascending noise levels above 0, separated by "
                         "commas, such as 0.3, 1, 4")
    return edges


def constant(sigma: float) -> float:
    """Ramp that changes nothing: 1 at every noise level."""
    return 1.0


@dataclass(frozen=True)
class Ramp:
    """Factor of a weight that goes from `first` at the high end of a window, where sampling enters it, to `last` at the low.

    Linear in log sigma, constant beyond the ends. first = last = 1 changes nothing. ValueError for a window whose ends are
    not positive and finite.
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


FALLING = 2.0, 0.0
"""First and last factor of a `Ramp`, for a weight that falls with the noise; their mean over log sigma is 1.

Where the noise is high, a step changes what an image shows; where it is low, it changes single pixels, of which networks
see too much. docs/benchmark.md compares both.
"""


@dataclass(frozen=True)
class Schedule:
    """Where guidance acts and how its weight changes there: a window of noise levels and a ramp inside it."""

    window: NoiseInterval = EVERYWHERE
    ramp: Callable[[float], float] = constant  # (sigma) -> factor of the weight, such as a `Ramp`; neutral: 1

    def factor_at(self, sigma: float) -> float:
        """Factor of the weight at a noise level; 0 outside the window."""
        return self.ramp(sigma) if sigma in self.window else 0.0


def falling(sigmas: Sequence[float]) -> Schedule:
    """The schedule of new terms: `FALLING` along the steps of a sampler. sigmas: its noise levels, descending to 0."""
    return Schedule(ramp=Ramp(NoiseInterval(sigmas[-2], sigmas[0]), *FALLING))


ALWAYS = Schedule()
