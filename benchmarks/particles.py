"""Samplers of several images for each that is wanted, judged on the way: best of N, and Feynman-Kac steering.

FK steering (Singhal et al. 2025) draws the particles of an image anew now and then, each with a weight of exp(gain * what
its energy fell by). The papers' samplers are stochastic; here the sampler is Euler's, and only a particle that was drawn
again takes an ancestral step, with fresh noise, so that it parts from its copy. Works for any denoiser and any guider.
The core's particles need no unit of the energy, and share the drawing.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core import Denoiser, Guider, NoiseInterval, Prediction
from ppap_core.guidance.gradients import energy_at
from ppap_core.guidance.particles import systematic
from ppap_core.rng import seeded


@dataclass(frozen=True)
class Particles:
    """How many images are made for one, and when some of them are given up. count 1: plain sampling, bit for bit."""

    count: int = 1
    gain: float = 0.0        # lambda of FK steering, for each unit of energy; 0: best of N, no particle is drawn anew
    resample: NoiseInterval = NoiseInterval()  # where particles are drawn anew
    select: float = 0.0      # noise level from which on the best particle goes on alone; 0: it is chosen at the end


class Steering(NamedTuple):
    """A denoiser, guided or not, and the energy (B,) of what it expects, lower is better."""

    denoise: Denoiser
    energy: Callable[[Prediction], Tensor]


def sample_particles(steering: Callable[[int], Steering], x: Tensor, sigmas: Tensor, particles: Particles,
                     seeds: Sequence[int]) -> Tensor:
    """Samples (B, C, H, W) by Euler steps, each the best of its particles.

    steering: (particles of each image) -> for a batch that holds the particles of an image one after another; the denoiser
    must not remember earlier steps. x (B, C, H, W): noise * sigmas[0], of the first particle of each image; sigmas
    (steps + 1,): descending, ending in 0. seeds: one for each image.

    Image i depends on x[i] and seeds[i] only: particle p from 1 on starts at noise of seeded(seeds[i], p), step k is drawn
    anew with seeded(seeds[i], k, 0, 0), and copies get noise of seeded(seeds[i], k, 1, 0).
    """
    swarm = Swarm(_start(x, float(sigmas[0]), particles.count, seeds), particles.count, particles, seeds)
    for index, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        swarm.step(index, steering(swarm.count), sigma, next_sigma)
    return swarm.x


def _start(x: Tensor, sigma: float, count: int, seeds: Sequence[int]) -> Tensor:
    others = [[torch.randn(x.shape[1:], generator=seeded(seed, p)).to(x) * sigma for p in range(1, count)] for seed in seeds]
    return torch.stack([torch.stack([first, *rest]) for first, rest in zip(x, others, strict=True)]).flatten(0, 1)


@dataclass
class Swarm:
    """The particles of all images during one sampling, those of an image one after another."""

    x: Tensor     # (B * count, C, H, W)
    count: int    # for each image
    particles: Particles
    seeds: Sequence[int]
    energy: Tensor | float = 0.0  # (B, count) when they were last drawn

    def step(self, index: int, steering: Steering, sigma: float, next_sigma: float) -> None:
        """An Euler step, after which particles are given up where it is time."""
        level = self.x.new_full((len(self.x),), sigma)
        denoised = steering.denoise(self.x, level)
        fresh: list[tuple[int, int]] = []  # (particle, image) of those that were drawn again
        if self.count > 1 and (sigma <= self.particles.select or next_sigma == 0):
            denoised = self._keep(self._energies(steering, level, denoised).argmin(1, keepdim=True), denoised)
        elif self.count > 1 and self.particles.gain and sigma in self.particles.resample:
            chosen = self._draw(index, self._energies(steering, level, denoised))
            denoised = self._keep(chosen, denoised)
            repeated = (chosen[:, 1:] == chosen[:, :-1]).nonzero().tolist()
            fresh = [(image * self.count + place + 1, image) for image, place in repeated]
        noise = self.x - denoised
        self.x = denoised + noise * (next_sigma / sigma)
        for image in sorted({image for _, image in fresh}):
            rows = [row for row, owner in fresh if owner == image]
            self.x[rows] = self._ancestral(denoised[rows], noise[rows], (sigma, next_sigma), (self.seeds[image], index))

    def _energies(self, steering: Steering, level: Tensor, denoised: Tensor) -> Tensor:
        return steering.energy(Prediction(self.x, level, denoised)).reshape(-1, self.count)

    def _draw(self, index: int, energy: Tensor) -> Tensor:
        weights = (self.particles.gain * (self.energy - energy)).softmax(1)
        generators = [seeded(seed, index, 0, 0) for seed in self.seeds]
        chosen = torch.stack([systematic(*pair) for pair in zip(weights, generators, strict=True)])
        self.energy = energy.gather(1, chosen)
        return chosen

    def _keep(self, chosen: Tensor, denoised: Tensor) -> Tensor:
        rows = (torch.arange(len(chosen), device=chosen.device)[:, None] * self.count + chosen).flatten()
        self.x, self.count = self.x[rows], chosen.shape[1]
        return denoised[rows]

    def _ancestral(self, denoised: Tensor, noise: Tensor, levels: tuple[float, float], key: tuple[int, int]) -> Tensor:
        sigma, next_sigma = levels
        up = next_sigma * math.sqrt(1 - (next_sigma / sigma) ** 2)
        draws = torch.randn(denoised.shape, generator=seeded(*key, 1, 0)).to(denoised)
        return denoised + noise * (math.sqrt(next_sigma**2 - up**2) / sigma) + up * draws


def repeat_guider(guider: Guider, count: int) -> Guider:
    """The guider for batches that hold `count` particles of each image one after another."""
    return replace(guider, target=_repeat(guider.target, count), prompt=_repeat(guider.prompt, count))


def _repeat(part: Tensor | None, count: int) -> Tensor | None:
    return part if part is None or len(part) == 1 else part.repeat_interleave(count, 0)


@torch.no_grad()
def energy_of(guider: Guider, prediction: Prediction) -> Tensor:
    """Energy (B,) of what the guider looks at, without a gradient."""
    return energy_at(guider, prediction.x if guider.view == "noisy" else prediction.denoised, prediction.sigma)
