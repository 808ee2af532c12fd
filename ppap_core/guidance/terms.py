"""Terms of guidance: a guider with its weight, schedule and mask, and the record of its effect at one noise level."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..guiders.guider import Guider
from ..schedules import ALWAYS, Schedule


@dataclass(frozen=True)
class Term:
    """One guider's part in guidance.

    A weight of 0, a schedule whose factor is 0, or a mask of zeros removes the term: its network does not run.
    """

    guider: Guider
    weight: float = 1.0
    schedule: Schedule = ALWAYS
    mask: Tensor | None = None            # (B|1, 1, H, W) in [0, 1] on the grid of x; None: the whole image
    normalized: bool = False              # True: the shift has rms weight * posterior_std; False: weight scales the gradient
    backprop_through_model: bool = False  # whether the gradient goes back through the denoiser to x; noisy view: no effect
    substeps: int = 1                     # parts of a shift, each begun where the last led; 1: none; noisy view: no effect

    def __post_init__(self):
        if self.substeps < 1:
            raise ValueError(f"a shift has at least one part, got {self.substeps} sub-steps: give 1 for none")

    @property
    def needs_vjp(self) -> bool:
        """Whether the denoiser must be differentiated; the gradient of a guider of the noisy view is in x already."""
        return self.backprop_through_model and self.guider.view == "denoised"

    @property
    def parts(self) -> int:
        """Number of parts of a shift; that of a guider of the noisy view is one, because its x does not move."""
        return self.substeps if self.guider.view == "denoised" else 1

    def weight_at(self, sigma: float) -> float:
        """Weight at a noise level; 0 when the network need not run."""
        if self.mask is not None and not bool(self.mask.any()):
            return 0.0
        return self.weight * self.schedule.factor_at(sigma)


class TermRecord(NamedTuple):
    """Effect of one term at one noise level."""

    term: int         # index of the term
    sigma: float
    energy: Tensor    # (B,) before the shift
    rms: Tensor       # (B,) root mean square of the term's shift, in data units, before any limit
    unguided: int = 0                      # images whose gradient was not finite
    fallback: torch.dtype | None = None    # type that the network computed in, if it failed in the one that was asked for


def any_needs_vjp(terms: Sequence[Term], sigma: float) -> bool:
    """Whether a term that acts at a noise level needs the denoiser's VJP."""
    return any(term.needs_vjp and term.weight_at(sigma) != 0 for term in terms)
