"""Diffusion models as plug-and-play priors (Graikos et al. 2022): the image that satisfies constraints, by optimisation.

Nothing is sampled. A point is moved until the diffusion model takes it for an image, at ever lower noise, and until the
guiders take it for their targets. The point may be anything that an image can be rendered from, such as the image itself.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..guiders.guider import clean
from ..noise import PIXEL_SIGMA_DATA, expand
from ..rng import noise_like, seeded_noise
from ..sampling import Denoiser, karras_sigmas, sample_euler
from ..training.loop import RunOptions, optimize
from ..training.state import Losses, all_finite
from .gradients import predict, rms
from .precision import RunState
from .shift import GuidanceSettings, checked_mask, term_gradient
from .terms import Term

WAVE, WAVES = 0.25, 3  # how far the noise levels swing, as a share of what is left of the fall, and how often

AnyTerm = TypeVar("AnyTerm")
Render = Callable[[Tensor], Tensor]
"""Points (B, ...) -> images (B, C, H, W); differentiable, each image from its own point only"""


@dataclass(frozen=True)
class PriorConfig:
    """Settings of a search. Each step of Adam has one noise level; levels fall from sigma_max to sigma_min.

    The fields from start_noise on belong to the whole search by `optimize_images`; `run_prior` ignores them.
    """

    steps: int = 300
    learning_rate: float = 1.0            # Adam's at the start, in units of sigma_data; 0 moves nothing
    sigma_max: float = 10.0
    sigma_min: float = 0.05
    backprop_through_model: bool = False  # True: the paper's gradient, one backward pass of the model more for each step
    start_noise: float = 1.0              # std of the noise added to the start, in units of sigma_data; 0 adds none
    particles: int = 1                    # searches for each image, of which the one of least energy is kept; 1: one
    frames: int = 1                       # consecutive images that form one video and are kept together; 1: single images
    renoise_sigma: float = 0.0            # noise level from which the result is sampled anew; 0: it stays as it is
    renoise_steps: int = 10               # steps of that sampling

    def __post_init__(self):
        if not 0 < self.sigma_min <= self.sigma_max < math.inf or self.steps < 1:
            raise ValueError(f"expected 0 < sigma_min <= sigma_max and at least one step, got {self.sigma_min}, "
                             f"{self.sigma_max} and {self.steps}")

    def identity(self) -> dict:
        """The settings that identify a search in its state file, under the names of version 0.1.0."""
        return {"steps": self.steps, "lr": self.learning_rate, "sigma_from": self.sigma_max, "sigma_to": self.sigma_min,
                "wave": WAVE, "waves": WAVES, "jacobian": self.backprop_through_model, "pairs": False}


@dataclass(frozen=True)
class PriorObjective:
    """The quantity to minimise: the noise error of a diffusion model plus the weighted energies of terms."""

    denoise: Denoiser                       # must let gradients through if the search backpropagates through the model
    terms: Sequence[Term] = ()              # none: the prior alone
    sigma_data: float = PIXEL_SIGMA_DATA    # standard deviation of the data: 0.5 for pixels, 1 for latents
    run: RunState = field(default_factory=RunState, compare=False)  # what is remembered and said once

    def energy(self, images: Tensor) -> Tensor:
        """Weighted sum of the terms' energies of clean images, (B, C, H, W) -> (B,)."""
        total = images.new_zeros(len(images))
        for index, term in enumerate(self.terms):
            energy = self.run.energy_gradient(index, term.guider, images, clean(images), None).energy
            total = total + term.weight * energy
        return total


class PriorGradient(NamedTuple):
    """Error of the predicted noise (B,), energy of the terms (B,), and the gradient in the image (B, C, H, W)."""

    error: Tensor
    energy: Tensor
    gradient: Tensor


def sigma_schedule(config: PriorConfig) -> list[float]:
    """Noise level of each step: linear in log sigma plus a cosine, both falling to sigma_min in the last step."""
    left = [1 - step / max(config.steps - 1, 1) for step in range(config.steps)]
    heights = [min(share * (1 + WAVE * math.cos(2 * math.pi * WAVES * (1 - share))), 1.0) for share in left]
    return [config.sigma_min * (config.sigma_max / config.sigma_min) ** height for height in heights]


def run_prior(objective: PriorObjective, start: Tensor, config: PriorConfig, seeds: Sequence[int],
              render: Render | None = None, options: RunOptions = RunOptions()) -> tuple[Tensor, Losses]:
    """Minimise the objective from `start` (B, ...): the points (B, ...), and [noise error, energy] of every step.

    The noise error is |D(x) - image|^2 / sigma^2 with x = image + sigma noise. Its gradient is scaled to that of
    -log p(x): without backpropagation through the model it is score distillation (Poole et al. 2023); with it, the scale is
    exact for Gaussian images of standard deviation sigma_data. Raw terms of weight 1 therefore lead to the most probable
    image given the targets; a normalized term pulls `weight` times as hard as the prior. Guiders judge to_vp(x) or the
    prediction D(x), as in guidance; config decides for all terms whether gradients go back through the model.

    seeds: one for each image; image i depends on start[i], seeds[i] and the terms' values for image i only.
    render: draws the images from the points; None: the points are the images.
    options: on_step gets (step, [noise error, energy], points). ValueError for another number of seeds, and for a denoiser
    without gradients if they are needed.
    """
    _require_seeds(seeds, start)
    search = _Search(objective, start, config, seeds, render)
    options = options.identified({"prior": config.identity(), "seeds": list(seeds)}).reporting(search.point.detach())
    losses = optimize({"point": search.point}, search.loss, config.steps, config.learning_rate * objective.sigma_data,
                      "the prior", options)
    return search.point.detach(), losses


class _Search:
    """The points of one search, and the loss of each step."""

    def __init__(self, objective: PriorObjective, start: Tensor, config: PriorConfig, seeds: Sequence[int],
                 render: Render | None):
        self.objective, self.seeds, self.render, self.sigmas = objective, seeds, render, sigma_schedule(config)
        self.backprop_through_model = config.backprop_through_model
        with torch.inference_mode(False):
            self.point = start.detach().clone().requires_grad_(True)

    def loss(self, step: int) -> Tensor:
        """[noise error, energy] as means over the batch; its gradient in the image is that of `prior_gradient`, scaled."""
        image = self.render(self.point) if self.render else self.point
        sigma = image.new_full((len(image),), self.sigmas[step])
        noise = noise_like(image, self.seeds, step)
        error, energy, gradient = prior_gradient(self.objective, image.detach(), noise, sigma, self.backprop_through_model)
        surrogate = (_gradient_scale(self.sigmas[step], self.objective.sigma_data) * gradient * image).sum()
        return torch.stack([error.mean() + (surrogate - surrogate.detach()), energy.mean()])


def _gradient_scale(sigma: float, sigma_data: float) -> float:
    """Factor that makes gradients about equally large at every noise level, so that Adam can average them."""
    return sigma * math.hypot(sigma, sigma_data) / sigma_data


def _require_seeds(seeds: Sequence[int], start: Tensor) -> None:
    if len(seeds) != len(start):
        raise ValueError(f"there are {len(seeds)} seeds for {len(start)} images: give one for each")


def prior_gradient(objective: PriorObjective, image: Tensor, noise: Tensor, sigma: Tensor,
                   backprop_through_model: bool = False) -> PriorGradient:
    """Gradient of -log p(image) plus the weighted energies, estimated from one draw of noise; see `run_prior`.

    image, noise (B, C, H, W); sigma (B,), one value. backprop_through_model: whether gradients go back through the model.
    """
    level = float(sigma[0])
    with torch.no_grad():
        prediction = predict(objective.denoise, image + level * noise, sigma, with_vjp=backprop_through_model)
    error = ((prediction.denoised - image) / level).square().flatten(1).mean(1)
    residual = (image - prediction.denoised) / level**2
    if prediction.vjp:
        residual = (residual - prediction.vjp(residual)) * (1 + (objective.sigma_data / level) ** 2)
    prior = objective.run.zero_nonfinite(residual, "the prior", level)
    settings = GuidanceSettings(objective.sigma_data, run=objective.run)
    energies, gradient = image.new_zeros(len(image)), prior
    for index, term in enumerate(objective.terms):
        weight = term.weight_at(level)
        if weight != 0:
            term = replace(term, backprop_through_model=backprop_through_model)
            result = term_gradient(term, prediction, settings, index)
            pull = result.gradient * expand(rms(prior), prior) if term.normalized else result.gradient
            energies, gradient = energies + result.energy, gradient + weight * pull
    return PriorGradient(error, energies, gradient)


def optimize_images(objective: PriorObjective, start: Tensor, config: PriorConfig, seeds: Sequence[int],
                    mask: Tensor | None = None, options: RunOptions = RunOptions()) -> tuple[Tensor, Losses]:
    """The whole search: noise on `start` (B, C, H, W), `run_prior`, new sampling, and the best of several particles.

    seeds: one for each search, B * config.particles of them; all images of the first particle come first.
    mask (B|1, 1, H, W) in [0, 1]: where images may change; None: everywhere. options: as in `run_prior`.
    Returns the images (B, C, H, W) and [noise error, energy] of every step. ValueError for images that are not finite.
    """
    start = start.repeat(config.particles, 1, 1, 1)
    _require_seeds(seeds, start)
    objective = replace(objective, terms=[repeat_term(term, config.particles) for term in objective.terms])
    mask = _repeat(mask, config.particles)
    render = None if mask is None else _Inpainting(start, checked_mask(mask, start))
    noise = seeded_noise(seeds, tuple(start.shape[1:])).to(start)
    noisy = start + config.start_noise * objective.sigma_data * noise
    points, losses = run_prior(objective, noisy, config, seeds, render, options)
    images = renoise_and_sample(objective.denoise, render(points) if render else points, config.renoise_sigma,
                                config.sigma_min, config.renoise_steps, seeds)
    images = render(images) if render else images
    if not all_finite([images]):
        raise ValueError("the images that were found are not finite: expected numbers; lower the learning rate or the noise "
                         "that is added at the end, or check the model")
    energies = objective.energy(images).unflatten(0, (-1, config.frames)).mean(1)
    return best_of(images.unflatten(0, (-1, config.frames)), energies, config.particles).flatten(0, 1), losses


@dataclass(frozen=True)
class _Inpainting:
    """Render that keeps the original image outside the mask."""

    original: Tensor
    mask: Tensor

    def __call__(self, point: Tensor) -> Tensor:
        return self.original + self.mask * (point - self.original)


def renoise_and_sample(denoise: Denoiser, image: Tensor, sigma: float, sigma_min: float, steps: int,
                       seeds: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) after adding noise of level sigma and sampling from there: SDEdit (Meng et al. 2022).

    sigma: 0 returns the image unchanged. sigma_min: the last level above 0. steps: Euler steps. seeds: one for each image.
    """
    if sigma == 0:
        return image
    noise = seeded_noise(seeds, tuple(image.shape[1:])).to(image)
    return sample_euler(denoise, image + sigma * noise, karras_sigmas(steps, min(sigma_min, sigma), sigma))


def repeat_term(term: AnyTerm, particles: int) -> AnyTerm:
    """The term for a batch that is repeated `particles` times: its values for single images are repeated; 1: as it is.

    term: a `Term`, or another dataclass with a guider and a mask.
    """
    changed: Any = term
    guider = changed.guider
    guider = replace(guider, target=_repeat(guider.target, particles), prompt=_repeat(guider.prompt, particles))
    return replace(changed, guider=guider, mask=_repeat(changed.mask, particles))


def _repeat(value: Tensor | None, particles: int) -> Tensor | None:
    return value if value is None or len(value) == 1 else value.repeat(particles, *(1,) * (value.ndim - 1))


def best_of(images: Tensor, energies: Tensor, particles: int) -> Tensor:
    """The particle of least energy for each image, (particles B, ...), (particles B,) -> (B, ...).

    All images of the first particle come first, then those of the second.
    """
    best, count = energies.reshape(particles, -1).argmin(0), len(images) // particles
    return images[best * count + torch.arange(count, device=images.device)]
