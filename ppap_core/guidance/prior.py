"""Diffusion models as plug-and-play priors (Graikos et al. 2022): the image that satisfies constraints, by optimisation.

Nothing is sampled. A point is moved until the diffusion model takes it for an image, at ever lower noise, and the guiders
take it for what they are aimed at. The point may be anything that an image can be drawn from, not only the image itself.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..guiders.guider import clean
from ..noise import expand
from ..rng import seeded, seeded_noise
from ..sampling import Denoiser, karras_sigmas, sample_euler
from ..training.loop import Losses, RunOptions, RunStep, optimize
from .gradients import differentiable, energy_gradient, finite
from .shift import mask_for, posterior_std, rms, term_gradient
from .terms import Term

Render = Callable[[Tensor], Tensor]
"""(point (B, ...)) -> image (B, C, H, W), differentiable, each image of its own point only"""

OnFound = Callable[[int, list[float], Tensor], None]
"""(step, [error of the noise, energy], points (B, ...)) after every step; may raise to stop."""


@dataclass(frozen=True)
class PriorConfig:
    """How a point is found. Each of Adam's steps has one noise level."""

    steps: int = 300
    lr: float = 1.0            # of Adam, where 1 is the spread of the data; falls to zero like a cosine
    sigma_from: float = 10.0   # noise levels fall evenly in the logarithm from here ...
    sigma_to: float = 0.05     # ... to here,
    wave: float = 0.25         # and swing by this share of what is left: 0, they only fall
    waves: int = 3             # so many times
    jacobian: bool = False     # whether the gradient goes through the model too, as published: one more pass of it
    pairs: bool = False        # whether each step asks for opposite noise too: near to the mode, less like a sample

    def __post_init__(self):
        if not 0 < self.sigma_to <= self.sigma_from < math.inf or self.steps < 1:
            raise ValueError(f"expected 0 < sigma_to <= sigma_from and at least one step, got {self.sigma_to}, "
                             f"{self.sigma_from} and {self.steps}")


def sigma_schedule(config: PriorConfig) -> list[float]:
    """The noise level of every step: linear in log sigma with a cosine on top, both running out together."""
    left = [1 - step / max(config.steps - 1, 1) for step in range(config.steps)]
    turn = 2 * math.pi * config.waves
    heights = [min(each * (1 + config.wave * math.cos(turn * (1 - each))), 1.0) for each in left]
    return [config.sigma_to * (config.sigma_from / config.sigma_to) ** height for height in heights]


def run_prior(denoise: Denoiser, terms: Sequence[Term], start: Tensor, config: PriorConfig, seeds: Sequence[int], *,
                   render: Render | None = None, sigma_data: float = 0.5, about: dict | None = None,
                   state_file: Path | None = None, on_step: OnFound | None = None,
                   run_step: RunStep | None = None) -> tuple[Tensor, Losses]:
    """The points (B, ...) found from `start`, and of every step the two things that were lowered, as means of the batch.

    Lowered are the error of the noise, |D(x) - image|^2 / sigma^2 with x = image + sigma noise, and the energies of the
    terms. The error's gradient is scaled to that of -log p(x), which it is without the Jacobian (Poole et al. 2023) and, if
    images were Gaussian with the spread sigma_data, with it: at weight 1, raw, what is found is the most probable image
    given what the guiders ask for. A balanced term pulls `weight` times as hard as the prior. Guiders look at what they look
    at in guidance: to_vp(x), or the prediction D(x), whose gradient goes through the model where config says so, whatever
    the term says; windows and ramps mean the noise level of the step.

    Point i depends on start[i], what the terms hold for it, and seeds[i] only. about, state_file, attempt: of `optimise`,
    which goes on where a run was stopped. ValueError for another number of seeds and where gradients do not pass.
    """
    _require_seeds(seeds, start)
    levels, terms = sigma_schedule(config), [replace(term, through=config.jacobian) for term in terms]
    with torch.inference_mode(False):
        point = start.detach().clone().requires_grad_(True)

    def loss(step: int) -> Tensor:
        image = render(point) if render else point
        fixed, sigma = image.detach(), image.new_full((len(image),), levels[step])
        noise = torch.stack([torch.randn(image.shape[1:], generator=seeded(seed, step)) for seed in seeds]).to(fixed)
        draws = [_pull(denoise, terms, fixed, sign * noise, sigma, config.jacobian, sigma_data)
                 for sign in ((1, -1) if config.pairs else (1,))]
        error, energy, gradient = (sum(parts) / len(draws) for parts in zip(*draws, strict=True))
        towards = (_size(levels[step], sigma_data) * gradient * image).sum()
        return torch.stack([error.mean() + (towards - towards.detach()), energy.mean()])

    options = RunOptions({**(about or {}), "prior": asdict(config), "seeds": list(seeds)}, state_file, on_step=on_step,
                         run_step=run_step).reporting(point.detach())
    losses = optimize({"point": point}, loss, config.steps, config.lr * sigma_data, "the prior", options)
    return point.detach(), losses


def _require_seeds(seeds: Sequence[int], start: Tensor) -> None:
    if len(seeds) != len(start):
        raise ValueError(f"there are {len(seeds)} seeds for {len(start)} images: give one for each")


def _pull(denoise: Denoiser, terms: Sequence[Term], image: Tensor, noise: Tensor, sigma: Tensor, jacobian: bool,
          sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """For one draw of noise: error of the noise for each value (B,), energy (B,), and the gradient (B, C, H, W)."""
    level = float(sigma[0])
    x = image + level * noise
    denoised, vjp = differentiable(denoise, x, sigma) if jacobian else (_plainly(denoise, x, sigma), None)
    error, energies = ((denoised - image) / level).square().flatten(1).mean(1), image.new_zeros(len(image))
    off = (image - denoised) / level**2
    prior = finite((off - vjp(off)) * (1 + (sigma_data / level) ** 2) if vjp else off, "the prior", level)
    gradient = prior
    for term in terms:
        strength = term.strength(level)
        if strength != 0:
            energy, pull = term_gradient(term, x, sigma, denoised, posterior_std(level, sigma_data), vjp)
            pull = pull * expand(rms(prior), pull) if term.balanced else pull
            energies, gradient = energies + energy, gradient + strength * pull
    return error, energies, gradient


def _plainly(denoise: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    with torch.no_grad():
        return denoise(x, sigma)


def _size(sigma: float, sigma_data: float) -> float:
    """What makes the gradient about as large at every noise level, so that Adam may compare them."""
    return sigma * math.hypot(sigma, sigma_data) / sigma_data


def optimize_images(denoise: Denoiser, terms: Sequence[Term], start: Tensor, config: PriorConfig, seeds: Sequence[int], *,
                start_noise: float = 1.0, mask: Tensor | None = None, particles: int = 1, frames: int = 1,
                level: float = 0.0, steps: int = 10, sigma_data: float = 0.5, **run: Any) -> tuple[Tensor, Losses]:
    """The whole search for images (B, C, H, W): from `start` under noise, with a clean-up, the best of several particles.

    start_noise: in spreads of the data; 0: from `start` as it is. mask (B|1, 1, H, W) in [0, 1]: where images may change;
    None: everywhere. particles: how many searches there are for each image, for which seeds has to hold a number each, one
    round of all images after another. frames: how many images in a row are one video, of which all or none are taken.
    level, steps: of `clean_up`. run: what else `run_prior` takes.
    """
    start = start.repeat(particles, 1, 1, 1)
    _require_seeds(seeds, start)
    terms = [repeat_term(term, particles) for term in terms]
    free = None if mask is None else mask_for(_repeat(mask, particles), start)
    render = None if free is None else lambda point: start + free * (point - start)
    noise = start_noise * sigma_data * seeded_noise(seeds, tuple(start.shape[1:])).to(start)
    points, losses = run_prior(denoise, terms, start + noise, config, seeds, render=render, sigma_data=sigma_data,
                                    **run)
    tidy = renoise_and_sample(denoise, render(points) if render else points, level, config.sigma_to, steps, seeds)
    images = render(tidy) if render else tidy
    energies = energy_of(terms, images).unflatten(0, (-1, frames)).mean(1)
    return best_of(images.unflatten(0, (-1, frames)), energies, particles).flatten(0, 1), losses


def renoise_and_sample(denoise: Denoiser, image: Tensor, sigma: float, sigma_to: float, steps: int, seeds: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) after noise of level sigma and sampling from there (Meng et al. 2022). 0 changes nothing."""
    if sigma == 0:
        return image
    noise = seeded_noise(seeds, tuple(image.shape[1:])).to(image)
    return sample_euler(denoise, image + sigma * noise, karras_sigmas(steps, min(sigma_to, sigma), sigma))


def repeat_term(term: Term, particles: int) -> Term:
    """The term for a batch that is there `particles` times in a row: what it holds for each image is repeated."""
    guider = term.guider
    parts = {name: _repeat(getattr(guider, name), particles) for name in ("target", "prompt")}
    return replace(term, guider=replace(guider, **parts), mask=_repeat(term.mask, particles))


def _repeat(value: Tensor | None, particles: int) -> Tensor | None:
    return value if value is None or len(value) == 1 else value.repeat(particles, *(1,) * (value.ndim - 1))


def best_of(images: Tensor, energies: Tensor, particles: int) -> Tensor:
    """Of a batch that is there `particles` times in a row, for each image the one of least energy: (particles B, ...),
    (particles B,) -> (B, ...)."""
    best, count = energies.reshape(particles, -1).argmin(0), len(images) // particles
    return images[best * count + torch.arange(count, device=images.device)]


def energy_of(terms: Sequence[Term], images: Tensor) -> Tensor:
    """The weighted energies of clean images (B, C, H, W) in sum, (B,)."""
    total = images.new_zeros(len(images))
    for term in terms:
        total = total + term.weight * energy_gradient(term.guider, images, clean(images), images)[0]
    return total
