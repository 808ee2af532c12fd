"""Distillation and dispatch as the released code of PPAP (Go et al. 2023) has them, defects included, to be measured beside
ours.

From the description of that code: intervals are trained one after another in one adapter that is never made anew, by one
AdamW whose moments survive while its rate starts again; a timestep on the edge of two intervals goes to the lower expert,
which never saw it. What it does to batch norm and to the range of its inputs has no counterpart in the tiny world, whose
networks have neither; that adapters stay unmerged and networks are copied costs time and memory, see `ppap costs`.
"""
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ppap_core.experts.bank import ExpertBank
from ppap_core.experts.samples import BatchSpec, Pairs, SampleStore
from ppap_core.guiders.guider import Guider
from ppap_core.io.files import load_tensors, save_tensors, with_prefix, without_prefix
from ppap_core.noise import expand, to_vp
from ppap_core.rng import seeded
from ppap_core.schedules import ExpertSchedule

TIMESTEPS = 1000
RANK, ALPHA, TEMPERATURE, WEIGHT_DECAY = 16, 8.0, 0.25, 0.05
BETAS = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
SIGMAS = (1 / (1 - BETAS).cumprod(0) - 1).sqrt().float()  # of timesteps 0 ... 999


def ddim_sigmas(steps: int) -> Tensor:
    """Noise levels of DDIM with evenly spaced timesteps, descending, ending in 0, (steps + 1,): Euler's steps are DDIM's."""
    return torch.cat([SIGMAS[::TIMESTEPS // steps].flip(0), SIGMAS.new_zeros(1)])


def schedule(experts: int = 5) -> ExpertSchedule:
    """The paper's split: equal shares of the timesteps. ValueError for more experts than intervals between timesteps."""
    if not 1 <= experts < TIMESTEPS:
        raise ValueError(f"cannot split {TIMESTEPS} timesteps among {experts} experts")
    edges = [float(SIGMAS[round(index * TIMESTEPS / experts)]) for index in range(experts)]
    return ExpertSchedule((*edges, float(SIGMAS[-1])))


def pairs(store: SampleStore, experts: int, index: int, step: int, size: int) -> Pairs:
    """Images, some mirrored, under the noise of timesteps drawn evenly from an interval."""
    generator, width = seeded(0, index, step), TIMESTEPS // experts
    images = store.random_images(BatchSpec(step, size, index))
    images = torch.where(torch.rand(size, 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
    sigma = SIGMAS[torch.randint(index * width, (index + 1) * width, (size,), generator=generator)]
    noise = torch.randn(images.shape, generator=generator)
    return Pairs(images, to_vp(images + expand(sigma, images) * noise, sigma), sigma)


def distill(bank: ExpertBank, store: SampleStore, loss: Callable[[Pairs], Tensor], steps: int, batch: int, lr: float,
           file: Path, on_step: Callable[[int, int, float], None]) -> None:
    """Train interval after interval, each from where the one before ended; a bank that the file holds is only read."""
    experts, moments = range(len(bank.schedule)), {}
    for index in () if file.exists() else experts:
        if index:
            bank.load(index, bank.weights(index - 1))
        with torch.enable_grad(), bank.trainable(index) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                value = loss(pairs(store, len(experts), index, step, batch)).mean()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                on_step(index, step, value.item())
            moments = optimizer.state_dict()["state"]
    if not file.exists():
        save_tensors(file, {name: weight for index in experts
                            for name, weight in with_prefix(str(index), bank.weights(index)).items()}, {})
    tensors = load_tensors(file)[0]
    for index in experts:
        bank.load(index, without_prefix(str(index), tensors))


class LowerOnEdges(nn.Module):
    """A bank that asks the lower expert on an edge."""

    def __init__(self, bank: ExpertBank):
        super().__init__()
        self.bank = bank

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        on_edge = any(math.isclose(float(sigma[0]), edge, rel_tol=1e-5) for edge in self.bank.schedule.edges[1:-1])
        return self.bank(image, sigma * (1 - 1e-4) if on_edge else sigma)


def lower_on_edges(guider: Guider) -> Guider:
    """The guider with the original's dispatch."""
    return replace(guider, net=LowerOnEdges(guider.net))
