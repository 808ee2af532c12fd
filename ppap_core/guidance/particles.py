"""Feynman-Kac steering: several particles for each image, of which the better ones go on more often (Singhal et al. 2025).

Now and then while they are sampled, the particles of one image are drawn anew by how good the image is that the model
expects of each. A particle that was drawn twice has a part of its noise renewed, so that copies part ways. No gradient is
needed, and any sampler will do.

Particles of B images with N particles each are a batch of N * B, all images of the first particle first.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..noise import PIXEL_SIGMA_DATA, expand
from ..rng import noise_like, seeded
from ..sampling import Denoiser
from .gradients import Prediction

HALVINGS = 50            # of the range in which the sharpness is searched
SHARPEST = 1e4           # for energies in their spread: only the best one is left
FIRST, LAST = 15.0, 2.0  # noise levels over the data's standard deviation, between which what an image shows is decided
DRAW, RENEW = 1, 2       # keys of randomness
Standing = Callable[[Prediction], Tensor]
"""What is expected of all particles -> how good each is among those of its image, (B, N), higher is better"""


@dataclass(frozen=True)
class Resampling:
    """How many particles there are for each image, and how they are drawn anew.

    count: 1 is plain sampling, bit for bit. times: how often, where an image is decided: see `turns`. strength: the share of
    the particles but one that is given up each time, in effective numbers, in [0, 1]; 0: none, the best of `count`
    independent samples is taken at the end; 1: all go on from the best one. ValueError for values out of range.
    """

    count: int = 1
    strength: float = 0.75
    times: int = 4

    def __post_init__(self):
        if self.count < 1 or self.times < 0 or not 0 <= self.strength <= 1:
            raise ValueError(f"got {self.count} particles that are drawn {self.times} times at strength {self.strength}: "
                             "expected at least 1 particle, 0 times or more, and a strength from 0 to 1")

    def turns(self, sigmas: Sequence[float], sigma_data: float) -> list[int]:
        """After how many steps particles are drawn anew, ascending.

        Before, predictions are too blurred to tell good from bad; later, copies part no more. The noise levels of the
        drawings fall evenly in log sigma between the two, as far as the steps go; none is after the last step but one.

        sigmas: (steps + 1), descending to 0. sigma_data: standard deviation of the data, in the same unit.
        """
        if self.count == 1 or self.strength == 0:
            return []
        ratio = (LAST / FIRST) ** (1 / max(self.times - 1, 1))
        levels = [FIRST * sigma_data * ratio**turn for turn in range(self.times)]
        places = {next(step for step, sigma in enumerate(sigmas) if step > 0 and sigma <= level) for level in levels}
        return sorted(place for place in places if place <= len(sigmas) - 3)

    def weights(self, standing: Tensor) -> Tensor:
        """Probabilities (..., N) by which particles of a standing (..., N) are drawn; see `standings`."""
        return tempered(standing, 1 + (self.count - 1) * (1 - self.strength))


def effective_number(weights: Tensor) -> Tensor:
    """Effective number of particles of weights (..., N) that sum to 1, 1 / sum w^2: from 1 to N (Kong et al. 1994)."""
    return 1 / weights.square().sum(-1)


def tempered(standing: Tensor, number: float) -> Tensor:
    """Weights proportional to exp(sharpness * standing) with an effective number of particles, (..., N) -> (..., N).

    The sharpness is found for each group alone, as in adaptive tempering (Del Moral et al. 2012), so that the unit of the
    standing does not matter. Where equal ones are the best it ends at their number; equal standings keep equal weights.
    number: from 1 to N.
    """
    known = standing.double()
    best = known.amax(-1, keepdim=True)
    gap = torch.where(known == best, 0, known - best)  # also where all are -inf
    spread = torch.where(gap.isfinite(), -gap, 0).amax(-1, keepdim=True)
    gap = gap / torch.where(spread > 0, spread, 1)
    low, high = torch.zeros_like(spread), torch.full_like(spread, SHARPEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_flat = effective_number((middle * gap).softmax(-1))[..., None] > number
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    weights = (high * gap).softmax(-1)
    flat = torch.where(gap.isfinite(), 1.0, 0.0).to(weights)
    flat = flat / flat.sum(-1, keepdim=True)
    return torch.where(effective_number(flat)[..., None] <= number, flat, weights)


def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """N ascending indices (N,) drawn by weights (N,) that sum to 1, with one random number; equal weights keep everyone."""
    count = len(weights)
    places = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(count)) / count
    return torch.searchsorted(weights.cpu().double().cumsum(0), places, right=True).clamp_max(count - 1).to(weights.device)


def renew_noise(x: Tensor, denoised: Tensor, share: float, level: float, noise: Tensor) -> Tensor:
    """A noisy state (B, C, H, W) with a share of the variance of its noise exchanged, at the same level.

    x: image + level * noise; denoised: the image that is expected. share 0: x; 1 - (level / sigma)^2 makes an Euler step
    from sigma to level the ancestral one. noise: standard normal, like x.
    """
    kept = (x - denoised) / level
    return x if share == 0 else denoised + level * (math.sqrt(1 - share) * kept + math.sqrt(share) * noise)


@dataclass(frozen=True)
class Drawn:
    """Particles that were drawn anew."""

    rows: Tensor      # (N * B,) where each is taken from in the batch before
    copied: Tensor    # (N * B,) whether it is a repetition of another one that goes on
    number: Tensor    # (B,) effective number of particles before


def draw(resampling: Resampling, standing: Tensor, seeds: Sequence[int], turn: int) -> Drawn:
    """Draw the particles of each image anew.

    standing: (B, N), higher is better. seeds: one for each image, which depends on its own alone. turn: number of the
    drawing.
    """
    weights = resampling.weights(standing)
    chosen = torch.stack([systematic(row, seeded(seed, DRAW, turn)) for row, seed in zip(weights, seeds, strict=True)])
    copied = torch.zeros_like(chosen, dtype=torch.bool)
    copied[:, 1:] = chosen[:, 1:] == chosen[:, :-1]
    images = torch.arange(len(chosen), device=chosen.device)
    return Drawn((chosen.T * len(chosen) + images).flatten(), copied.T.flatten(), effective_number(weights))


def split_copies(x: Tensor, denoised: Tensor, drawn: Drawn, levels: tuple[float, float], seeds: Sequence[int],
                 turn: int) -> Tensor:
    """States (N * B, C, H, W) of drawn particles, whose copies take another, ancestral step from the same prediction.

    x: after the step, as drawn; denoised: of the step, as drawn. levels: sigma at its start and at its end.
    """
    sigma, level = levels
    keys = [seed for _ in range(len(x) // len(seeds)) for seed in seeds]
    fresh = torch.stack([noise_like(x[row:row + 1], [seed], RENEW, turn, row // len(seeds))[0]
                         for row, seed in enumerate(keys)])
    renewed = renew_noise(x, denoised, 1 - (level / sigma) ** 2, level, fresh)
    return torch.where(expand(drawn.copied, x) > 0, renewed, x)


def first_noise(noise: Tensor, count: int, seeds: Sequence[int]) -> Tensor:
    """Noise (N * B, C, H, W) of particles: the given one (B, C, H, W) for the first of each image, else of its seed."""
    return torch.cat([noise, *(noise_like(noise, seeds, particle) for particle in range(1, count))])


def best_rows(standing: Tensor) -> Tensor:
    """Where the best particle of each image is in the batch, (B,). standing: (B, N)."""
    return standing.argmax(1) * len(standing) + torch.arange(len(standing), device=standing.device)


def sample_particles(denoise: Denoiser, judge: Standing, noise: Tensor, sigmas: Tensor, resampling: Resampling,
                     seeds: Sequence[int], sigma_data: float = PIXEL_SIGMA_DATA) -> Tensor:
    """Samples (B, C, H, W) by Euler steps, each the best of its particles.

    noise (B, C, H, W): standard normal, of the first particle of each image. sigmas (steps + 1,): descending, ending in 0.
    seeds: one for each image, which depends on its noise and its seed alone. denoise, judge: of all particles. sigma_data:
    standard deviation of the data.
    """
    x = first_noise(noise, resampling.count, seeds) * float(sigmas[0])
    turns = resampling.turns(sigmas.tolist(), sigma_data)
    for step, (sigma, level) in enumerate(pairwise(sigmas.tolist()), 1):
        at = x.new_full((len(x),), sigma)
        state, denoised = x, denoise(x, at)
        x = denoised + (x - denoised) * (level / sigma)
        if step in turns:
            drawn = draw(resampling, judge(Prediction(state, at, denoised)), seeds, step)
            x = split_copies(x[drawn.rows], denoised[drawn.rows], drawn, (sigma, level), seeds, step)
    return x[best_rows(judge(Prediction(x, x.new_zeros(len(x)), x)))]
