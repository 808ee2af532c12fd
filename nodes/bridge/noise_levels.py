"""ComfyUI's noise levels in the core's convention, x = image + sigma * noise."""
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...ppap_core.guidance.autoguidance import Autoguidance
from ...ppap_core.noise import NoiseInterval, expand, flow_to_ve
from ...ppap_core.schedules import Ramp, constant
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


def window_of(sampling: Any, start: float, end: float) -> NoiseInterval:
    """Shares of the sampling as noise levels: 0 takes in the highest, 1 the lowest; windows that touch do not overlap."""
    low, high = (ve_level(sampling, sampling.percent_to_sigma(share)) for share in (end, start))
    return NoiseInterval(low, float("inf") if start <= 0 else high)


def ramp_for(model: Patcher, window: NoiseInterval, first: float, last: float) -> Callable[[float], float]:
    """A factor that goes from `first` to `last` over what a window has of a model's noise levels."""
    lowest, highest = sigma_range(model)
    low, high = max(window.lo, lowest), min(window.hi, highest)
    return constant if low >= high or first == last == 1 else Ramp(NoiseInterval(low, high), first, last)


def autoguidance_for(model: Patcher, weight: float, start: float, end: float, first: float, last: float) -> Autoguidance:
    """Settings in shares of the sampling as noise levels of a model."""
    window = window_of(model.get_model_object("model_sampling"), start, end)
    return Autoguidance(weight, window, ramp_for(model, window, first, last))
