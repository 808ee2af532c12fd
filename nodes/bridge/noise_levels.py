"""ComfyUI's noise levels in the core's convention, x = image + sigma * noise."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...ppap_core.noise import NoiseInterval, expand, flow_to_ve
from ...ppap_core.schedules import Ramp, Schedule, constant
from .latents import Patcher

PURE_NOISE = 100.0  # above this noise level nothing can be seen; a flow starts there, at t = 1


def is_flow(sampling: Any) -> bool:
    return isinstance(sampling, comfy.model_sampling.CONST)


def to_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """ComfyUI's noisy state and noise level in the core's convention, x = image + sigma * noise."""
    if not is_flow(sampling):
        return x, sigma
    x, sigma = flow_to_ve(x, sigma.clamp(max=0.9999))  # a flow starts at pure noise, t = 1, which no VE level can say
    return x, sigma * getattr(sampling, "noise_scale", 1.0)


def from_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The way back: a noisy state and noise level of the core as ComfyUI's model wants them."""
    if not is_flow(sampling):
        return x, sigma
    time = sigma / (sigma + getattr(sampling, "noise_scale", 1.0))
    return x * expand(1 - time, x), time


def ve_level(sampling: Any, sigma: float) -> float:
    """One noise level of ComfyUI in the core's convention."""
    return to_ve(sampling, torch.ones(1, 1), torch.tensor([float(sigma)], dtype=torch.float64))[1].item()


def sigma_range(model: Patcher) -> tuple[float, float]:
    """Lowest and highest noise level of a model."""
    sampling = model.get_model_object("model_sampling")
    return ve_level(sampling, sampling.sigma_min), ve_level(sampling, sampling.sigma_max)


@dataclass(frozen=True)
class PercentSchedule:
    """When a feature acts, in ComfyUI's percent: shares of the noise schedule, not of the steps. By default always."""

    start: float = 0.0            # 0 takes in the highest noise level
    end: float = 1.0              # 1 takes in the lowest
    factor_at_start: float = 1.0  # of the weight; in between it changes linearly in log sigma
    factor_at_end: float = 1.0

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError(f"steering would start at {self.start:g} and end at {self.end:g}: expected a start_percent "
                             "that is not above end_percent")

    def in_sigmas(self, model: Patcher) -> Schedule:
        """Convert to noise levels of a model."""
        return Schedule(self.window(model.get_model_object("model_sampling")), self.ramp(model))

    def window(self, sampling: Any) -> NoiseInterval:
        """The noise levels from start to end; windows that touch do not overlap."""
        low, high = (ve_level(sampling, sampling.percent_to_sigma(percent)) for percent in (self.end, self.start))
        return NoiseInterval(low, float("inf") if self.start <= 0 else high)

    def ramp(self, model: Patcher) -> Callable[[float], float]:
        """The factor of the weight, over the part of the window that lies within a model's noise levels."""
        window, (lowest, highest) = self.window(model.get_model_object("model_sampling")), sigma_range(model)
        low, high = max(window.lo, lowest), min(window.hi, highest)
        if low >= high or self.factor_at_start == self.factor_at_end == 1:
            return constant
        return Ramp(NoiseInterval(low, high), self.factor_at_start, self.factor_at_end)
