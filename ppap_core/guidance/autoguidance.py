"""Autoguidance (Karras et al. 2024): guide a model away from a bad version of itself.

The bad model does the same task on the same conditioning, with less capacity or less training, and so errs in the same
places, only more. What both do differently points from the errors of the one to those that the other would make less of.
"""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..noise import EVERYWHERE, NoiseInterval
from ..sampling import Denoiser
from ..schedules import constant


@dataclass(frozen=True)
class Autoguidance:
    """How strongly and where. weight 1, or a sigma outside the window = not there: the bad model is not asked."""

    weight: float = 2.0
    window: NoiseInterval = EVERYWHERE
    ramp: Callable[[float], float] = constant  # factor of weight - 1

    def weight_at(self, sigma: float) -> float:
        """The weight at a noise level, 1 where nothing is to be done."""
        return 1 + (self.weight - 1) * self.ramp(sigma) if sigma in self.window else 1.0


def autoguidance_delta(good: Tensor, bad: Tensor, weight: float) -> Tensor:
    """(weight - 1) (good - bad): what guidance by a worse prediction adds to any prediction.

    good + away is eq. 3 of the paper, bad + weight (good - bad); the sum over several worse ones is eq. 6, where the one
    without the condition makes classifier-free guidance.
    """
    return (weight - 1) * (good - bad)


def autoguided(good: Denoiser, bad: Denoiser, settings: Autoguidance) -> Denoiser:
    """A denoiser guided by a bad version of itself: a denoiser again, which any sampler and other guidance take."""
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        prediction, weight = good(x, sigma), settings.weight_at(float(sigma[0]))
        return prediction if weight == 1 else prediction + autoguidance_delta(prediction, bad(x, sigma), weight)
    return denoise
