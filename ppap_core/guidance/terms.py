"""Terms: one guider's part in guidance, and the record of its effect."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..guiders.guider import Guider
from ..noise import EVERYWHERE, NoiseInterval
from ..schedules import constant


@dataclass(frozen=True)
class Term:
    """One guider's part in guidance. weight 0, a sigma outside the window, or a zero mask = not there."""

    guider: Guider
    weight: float = 1.0
    window: NoiseInterval = EVERYWHERE
    ramp: Callable[[float], float] = constant
    mask: Tensor | None = None  # (B|1, 1, H, W) in [0, 1] on the grid of x
    balanced: bool = False      # whether the weight is a share of what is uncertain; else it scales the gradient as it is
    through: bool = False       # whether the gradient in the prediction goes on through the model; the noisy view has none

    @property
    def needs_model(self) -> bool:
        """Whether the model must be differentiated through."""
        return self.through and self.guider.view == "denoised"

    def strength(self, sigma: float) -> float:
        """Weight of the gradient at a noise level; 0 when the network need not run."""
        if sigma not in self.window or (self.mask is not None and not bool(self.mask.any())):
            return 0.0
        return self.weight * self.ramp(sigma)


class TermRecord(NamedTuple):
    """What one term did at one noise level."""

    term: int         # its place among the terms
    sigma: float
    energy: Tensor    # (B,) before its shift
    rms: Tensor       # (B,) size of its part of the shift, in units of the data, before the limit


class Shift(NamedTuple):
    """What guidance adds to a prediction (B, C, H, W), and what each term at work did."""

    shift: Tensor
    records: list[TermRecord]


def needs_model(terms: Sequence[Term], sigma: float) -> bool:
    """Whether terms at work at a noise level need `vjp`."""
    return any(term.needs_model and term.strength(sigma) != 0 for term in terms)
