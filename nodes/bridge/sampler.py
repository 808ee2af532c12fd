"""ComfyUI's samplers: their settings, its guider, and work done in the place of a sampler."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import comfy.samplers
import torch
from torch import Tensor

from .latents import Patcher

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
Result = TypeVar("Result")
Work = Callable[[Any, Tensor, dict], Result]
"""(predict(x, sigma, **extra_args) -> denoised, zeros where and as the model wants them, extra_args) -> anything"""


@dataclass(frozen=True)
class SamplerSettings:
    """How a MODEL is sampled, as in the stock KSampler."""

    seed: int
    steps: int
    cfg: float           # neutral: 1
    sampler_name: str
    scheduler: str
    positive: list       # CONDITIONING
    negative: list
    denoise: float = 1.0  # share of the noise schedule; 0 samples nothing


def new_cfg_guider(model: Patcher, positive: list, negative: list, cfg: float) -> comfy.samplers.CFGGuider:
    """Return ComfyUI's own guider on a model."""
    cfg_guider = comfy.samplers.CFGGuider(model)
    cfg_guider.set_conds(positive, negative)
    cfg_guider.set_cfg(cfg)
    return cfg_guider


def run_inside_sampler(cfg_guider: comfy.samplers.CFGGuider, shape: tuple[int, ...], seed: int,
                       work: Work[Result]) -> Result:
    """Return the result of `work`, done in the place of a sampler.

    ComfyUI has then loaded the model and prepared its conditioning. shape: of the zeros that work is given.
    """
    empty, sampler = torch.zeros(shape), _WorkSampler(work)
    cfg_guider.sample(empty, empty, comfy.samplers.KSAMPLER(sampler.sample), torch.tensor([1.0, 0.0]), seed=seed)
    return sampler.results[0]


class _WorkSampler(Generic[Result]):
    def __init__(self, work: Work[Result]):
        self.work, self.results = work, list[Result]()

    def sample(self, predict: Any, noise: Tensor, sigmas: Tensor, extra_args: dict, **unused: Any) -> Tensor:
        self.results.append(self.work(predict, noise, extra_args))
        return noise
