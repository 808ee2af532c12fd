"""ComfyUI's noise levels in the core's convention, x = image + sigma * noise."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
from torch import Tensor

from ...ppap_core.noise import NoiseInterval, expand, flow_to_ve
from ...ppap_core.schedules import Ramp, Schedule, constant
from .latents import Patcher

LAST_TIME = 0.9999  # of a flow, which starts at t = 1, where the VE level is infinite


def is_flow(sampling: Any) -> bool:
    """Tell whether a model's sampling is that of a flow, x = (1 - t) image + t noise."""
    return isinstance(sampling, comfy.model_sampling.CONST)


def starts_from_picture(sampling: Any) -> bool:
    """Tell whether a sampling turns one picture into another in a step from its highest noise level, as Lotus does."""
    return isinstance(sampling, comfy.model_sampling.IMG_TO_IMG)


def to_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Convert ComfyUI's noisy state (B, ...) and noise level (B,) to the core's convention."""
    if not is_flow(sampling):
        return x, sigma
    x, sigma = flow_to_ve(x, sigma.clamp(max=LAST_TIME))
    return x, sigma * getattr(sampling, "noise_scale", 1.0)


def from_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a noisy state (B, ...) and noise level (B,) of the core to what a model of ComfyUI takes."""
    if not is_flow(sampling):
        return x, sigma
    time = sigma / (sigma + getattr(sampling, "noise_scale", 1.0))
    return x * expand(1 - time, x), time


def ve_level(sampling: Any, sigma: float) -> float:
    """Convert one noise level of ComfyUI to the core's convention."""
    if not is_flow(sampling):
        return float(sigma)
    time = min(float(sigma), LAST_TIME)
    return time / (1 - time) * getattr(sampling, "noise_scale", 1.0)


def sigma_range(model: Patcher) -> tuple[float, float]:
    """Return the lowest and the highest VE noise level of a model."""
    sampling = model.get_model_object("model_sampling")
    return ve_level(sampling, sampling.sigma_min), ve_level(sampling, sampling.sigma_max)


@dataclass(frozen=True)
class PercentSchedule:
    """When a feature acts, in ComfyUI's percent: shares of the noise schedule, not of the steps. Neutral: the defaults."""

    start: float = 0.0            # 0 takes in the highest noise level
    end: float = 1.0              # 1 takes in the lowest
    factor_at_start: float = 1.0  # of the weight; in between it changes linearly in log sigma
    factor_at_end: float = 1.0

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError(f"guidance would start at {self.start:g} and end at {self.end:g}: expected a start_percent "
                             "that is not above end_percent")

    def in_sigmas(self, model: Patcher) -> Schedule:
        """Convert to noise levels of a model."""
        return Schedule(self.window(model.get_model_object("model_sampling")), self.ramp(model))

    def window(self, sampling: Any) -> NoiseInterval:
        """Return the noise levels from start to end; windows that touch do not overlap. sampling: of the model."""
        low, high = (ve_level(sampling, sampling.percent_to_sigma(percent)) for percent in (self.end, self.start))
        return NoiseInterval(low, float("inf") if self.start <= 0 else high)

    def ramp(self, model: Patcher) -> Callable[[float], float]:
        """Return the factor of the weight, over the part of the window that lies within a model's noise levels."""
        window, (lowest, highest) = self.window(model.get_model_object("model_sampling")), sigma_range(model)
        low, high = max(window.lo, lowest), min(window.hi, highest)
        if low >= high or self.factor_at_start == self.factor_at_end == 1:
            return constant
        return Ramp(NoiseInterval(low, high), self.factor_at_start, self.factor_at_end)
