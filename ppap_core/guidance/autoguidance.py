"""Autoguidance (Karras et al. 2024): guide a model away from a bad version of itself.

The bad model does the same task under the same conditioning with less capacity or less training, so it makes the same
errors, only larger. The difference of the two predictions therefore points away from the errors.
"""
from dataclasses import dataclass

from torch import Tensor

from ..sampling import Denoiser
from ..schedules import ALWAYS, Schedule


@dataclass(frozen=True)
class Autoguidance:
    """Strength of autoguidance. Where the weight is 1, the bad model is not run."""

    weight: float = 2.0          # 1 changes nothing
    schedule: Schedule = ALWAYS  # its factor scales weight - 1

    def weight_at(self, sigma: float) -> float:
        """Weight at a noise level; 1 where autoguidance does not act."""
        return 1 + (self.weight - 1) * self.schedule.factor_at(sigma)


def autoguidance_delta(good: Tensor, bad: Tensor, weight: float) -> Tensor:
    """Shift of a prediction away from a worse one: (weight - 1) (good - bad), all (B, C, H, W).

    Added to `good` it is eq. 3 of Karras et al. (2024), bad + weight (good - bad). With several worse predictions the shifts
    add up (eq. 6); the one of an unconditional model is classifier-free guidance. weight 1 gives zeros.
    """
    return (weight - 1) * (good - bad)


def autoguided(good: Denoiser, bad: Denoiser, settings: Autoguidance) -> Denoiser:
    """A denoiser guided away from a bad version of itself: a denoiser again, for any sampler and further guidance."""
    def denoise_autoguided(x: Tensor, sigma: Tensor) -> Tensor:
        prediction, weight = good(x, sigma), settings.weight_at(float(sigma[0]))
        return prediction if weight == 1 else prediction + autoguidance_delta(prediction, bad(x, sigma), weight)
    return denoise_autoguided
