"""Changes of a guided step, for any denoiser and any guider: moments, damping, sub-steps, and steps that are repeated.

Each denoiser here is made for one sampling. With weight 0 each predicts what the plain denoiser does, bit for bit.
"""
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ppap_core import Denoiser, GuidanceSettings, Moments, NoiseInterval, Prediction, Term, guidance_shift
from ppap_core.guidance.gradients import predict, rms
from ppap_core.guidance.precision import RunState
from ppap_core.guidance.shift import posterior_std, term_gradient
from ppap_core.noise import PIXEL_SIGMA_DATA, expand
from ppap_core.rng import noise_like
from ppap_core.schedules import ALWAYS

MIN_LENGTH = 1e-12  # of a way to the target, in data units


@dataclass(frozen=True)
class ChangedStep(ABC):
    """A denoiser guided by one term, whose shift another rule makes of the term's gradient."""

    denoise: Denoiser
    term: Term
    settings: GuidanceSettings = GuidanceSettings()
    run: RunState = field(default_factory=RunState)  # memory of the sampling

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        if not (weight := self.term.weight_at(level)):
            return self.denoise(x, sigma)
        return self.shifted(predict(self.denoise, x, sigma, self.term.needs_vjp), weight, level)

    @abstractmethod
    def shifted(self, prediction: Prediction, weight: float, sigma: float) -> Tensor:
        """The prediction after guidance."""

    def shift(self, prediction: Prediction, **changes: Any) -> Tensor:
        """The core's shift by the term with other fields."""
        guidance = guidance_shift([replace(self.term, **changes)], prediction, replace(self.settings, run=self.run))
        return guidance.delta if guidance else torch.zeros_like(prediction.denoised)


@dataclass(frozen=True)
class MomentStep(ChangedStep):
    """Adam's direction of the gradient in place of the gradient over its rms: a shift of about weight * posterior_std."""

    moments: Moments = Moments()

    def shifted(self, prediction: Prediction, weight: float, sigma: float) -> Tensor:
        std = posterior_std(sigma, self.settings.sigma_data)
        raw = self.shift(prediction, weight=1.0, normalized=False, schedule=ALWAYS) / std  # comparable at all noise levels
        return prediction.denoised + weight * std * self.run.moments_of("term", self.moments).direction(raw)


@dataclass(frozen=True)
class DampedStep(ChangedStep):
    """A normalized shift that never passes the target: w r -> w r / (1 + w r / length).

    length is the way to the target, rms 2 E / (n |dE/dD|) for an energy that is quadratic on it. For a Gaussian posterior of
    std r this is the mean of the distribution tilted by exp(-v E), v the raw weight of a shift of w r.
    """

    def shifted(self, prediction: Prediction, weight: float, sigma: float) -> Tensor:
        raw = term_gradient(replace(self.term, normalized=False, backprop_through_model=False), prediction, self.settings)
        slope = rms(raw.gradient) * raw.gradient[0].numel()
        length = 2 * raw.energy.abs() / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        factor = 1 / (1 + weight * posterior_std(sigma, self.settings.sigma_data) / length.clamp_min(MIN_LENGTH))
        return prediction.denoised + expand(factor, prediction.denoised) * self.shift(prediction)


@dataclass(frozen=True)
class SubStep(ChangedStep):
    """Several gradient steps on one prediction, each of an equal part of the weight, without another pass of the model."""

    parts: int = 1  # 1: the core's guidance

    def shifted(self, prediction: Prediction, weight: float, sigma: float) -> Tensor:
        return prediction.denoised + self.shift(prediction, substeps=self.parts)


@dataclass(frozen=True)
class Damping:
    """Factor of a weight: 1 / (1 + strength r^2), r the posterior std at a noise level (arXiv 2606.02884, theirs 2 lambda).

    Exact for Gaussian data and the energy |image - y|^2 / 2 with a raw weight of `strength`; for other energies a number to
    be searched. 0: no damping.
    """

    strength: float = 0.0
    sigma_data: float = PIXEL_SIGMA_DATA

    def __call__(self, sigma: float) -> float:
        return 1 / (1 + self.strength * posterior_std(sigma, self.sigma_data) ** 2)


def sample_repeating(denoise: Denoiser, x: Tensor, sigmas: Tensor, repeat: tuple[NoiseInterval, int],
                     seeds: Sequence[int]) -> Tensor:
    """Samples by Euler steps, some of which are done again from a noisier state ("time travel").

    x (B, C, H, W): noise * sigmas[0]; sigmas (steps + 1,): descending, ending in 0. repeat: noise levels, and how often a
    step there is done; 1: once, as everywhere else. seeds: one for each image; round r of step k, both from 0, begins with
    noise of seeded(seed, k, r, 1).
    """
    interval, rounds = repeat
    for index, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        for count in range(rounds if sigma in interval else 1):
            if count:
                x = x + math.sqrt(sigma**2 - next_sigma**2) * noise_like(x, seeds, index, count, 1)
            denoised = denoise(x, x.new_full((len(x),), sigma))
            x = denoised + (x - denoised) * (next_sigma / sigma)
    return x


STEPS: dict[str, Callable[..., ChangedStep]] = {"adam": MomentStep, "damped": DampedStep, "sub-steps": SubStep}
"""By a row's "way" in rows/*.json."""
