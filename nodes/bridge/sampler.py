"""ComfyUI's samplers: its guider, and work done in the place of a sampler."""
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from .latents import Patcher

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


def cfg_guider(model: Patcher, positive: list, negative: list, cfg: float) -> comfy.samplers.CFGGuider:
    """ComfyUI's own guider on a model."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def run_inside_sampler(guider: comfy.samplers.CFGGuider, shape: tuple[int, ...], seed: int,
                        work: Callable[[Any, Tensor, dict], Any]) -> Any:
    """What work(predict, noise, extra_args) returns, done where a sampler would be at work: ComfyUI has loaded the model and
    prepared its conditioning. noise: zeros of this shape, in the place and the type that the model wants."""
    found = []

    def sampler(predict: Any, noise: Tensor, sigmas: Tensor, extra_args: dict, **unused: Any) -> Tensor:
        found.append(work(predict, noise, extra_args))
        return noise

    empty = torch.zeros(shape)
    guider.sample(empty, empty, comfy.samplers.KSAMPLER(sampler), torch.tensor([1.0, 0.0]), seed=seed)
    return found[0]
