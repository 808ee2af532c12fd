"""Distillation and dispatch as the released code of PPAP (Go et al. 2023) does them, defects included, for comparison.

By the description of that code: intervals are trained one after another in a single adapter that is never reset, by a single
AdamW whose moments survive while its learning rate starts again; a timestep on the edge of two intervals goes to the lower
expert, which never saw it. Its treatment of batch norm and of the range of its inputs has no counterpart in the tiny world,
whose networks have neither. Unmerged adapters and copied networks cost time and memory: see `ppap costs`.
"""
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ppap_core import ExpertBank, ExpertSchedule, Guider, SampleStore, to_vp
from ppap_core.experts.pairs import Pairs
from ppap_core.experts.samples import BatchSpec
from ppap_core.io.files import with_prefix, without_prefix
from ppap_core.noise import expand
from ppap_core.rng import seeded
from ppap_core.training.loop import AdamW, OnStep, RunOptions, optimize

TIMESTEPS = 1000
RANK, ALPHA, TEMPERATURE, WEIGHT_DECAY = 16, 8.0, 0.25, 0.05
BETAS = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
SIGMAS = (1 / (1 - BETAS).cumprod(0) - 1).sqrt().float()  # of timesteps 0 ... 999

Loss = Callable[[ExpertBank, int, int], Tensor]
"""(bank of a single adapter, interval, step of the interval) -> the scalar that the step lowers"""


def ddim_sigmas(steps: int) -> Tensor:
    """Noise levels of DDIM at evenly spaced timesteps, descending, ending in 0, (steps + 1,): Euler's steps are DDIM's."""
    return torch.cat([SIGMAS[::TIMESTEPS // steps].flip(0), SIGMAS.new_zeros(1)])


def schedule(experts: int = 5) -> ExpertSchedule:
    """Equal shares of the timesteps, the split of the paper. ValueError for more experts than timesteps."""
    if not 1 <= experts <= TIMESTEPS - 1:
        raise ValueError(f"cannot split {TIMESTEPS} timesteps among {experts} experts")
    edges = [round(index * TIMESTEPS / experts) for index in range(experts)]
    return ExpertSchedule(tuple(SIGMAS[[*edges, -1]].tolist()))


def pairs(store: SampleStore, experts: int, index: int, step: int, size: int) -> Pairs:
    """Images, some mirrored, under the noise of timesteps drawn evenly from an interval."""
    generator, width = seeded(0, index, step), TIMESTEPS // experts
    images = store.random_images(BatchSpec(step, size, index))
    images = torch.where(torch.rand(size, 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
    sigma = SIGMAS[torch.randint(index * width, (index + 1) * width, (size,), generator=generator)]
    noise = torch.randn(images.shape, generator=generator)
    return Pairs(images, to_vp(images + expand(sigma, images) * noise, sigma), sigma)


def train(base: nn.Module, bank: ExpertBank, loss: Loss, steps: int, learning_rate: float, options: RunOptions) -> None:
    """Train one adapter on interval after interval, and give each expert of a bank the weights at its interval's end.

    base: the network of the bank without adapters.
    steps: for each interval.
    learning_rate: of each interval's first step, from where it falls to zero linearly.
    options: as `optimize` takes them; steps count through all intervals.
    """
    edges, count = bank.schedule.edges, len(bank.schedule)
    single = ExpertBank(base, ExpertSchedule((edges[0], edges[-1])), bank.lora, bank.view).to(next(bank.parameters()).device)
    experts = {name: weight.clone() for index in range(count)
               for name, weight in with_prefix(str(index), bank.weights(index)).items()}
    options = replace(options, extra_state=experts, on_step=partial(_keep, experts, steps, options.on_step))
    with single.trainable(0) as parameters:
        optimize(dict(zip(single.weights(0), parameters, strict=True)), partial(_loss_of, loss, single, steps),
                 steps * count, AdamW(partial(_linear, learning_rate, steps), WEIGHT_DECAY), "the adapter", options)
    for index in range(count):
        bank.load(index, without_prefix(str(index), experts))


def _loss_of(loss: Loss, single: ExpertBank, steps: int, step: int) -> Tensor:
    return loss(single, *divmod(step, steps))


def _linear(peak: float, steps: int, step: int) -> float:
    return peak * (1 - step % steps / steps)


def _keep(experts: dict[str, Tensor], steps: int, on_step: OnStep | None, step: int, value: float,
          weights: Mapping[str, Tensor]) -> None:
    if (step + 1) % steps == 0:
        for name, weight in with_prefix(str(step // steps), dict(weights)).items():
            experts[name].copy_(weight.detach())
    if on_step:
        on_step(step, value, weights)


class LowerOnEdges(nn.Module):
    """A bank that asks the lower expert for a noise level on an edge."""

    def __init__(self, bank: ExpertBank):
        super().__init__()
        self.bank = bank

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        on_edge = any(math.isclose(float(sigma[0]), edge, rel_tol=1e-5) for edge in self.bank.schedule.edges[1:-1])
        return self.bank(image, sigma * (1 - 1e-4) if on_edge else sigma)


def lower_on_edges(guider: Guider) -> Guider:
    """The guider with the original's dispatch."""
    return replace(guider, net=LowerOnEdges(cast(ExpertBank, guider.net)))
