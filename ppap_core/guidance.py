"""Guidance as a shift of the denoised prediction: one formula for every sampler, because samplers only ever see that.

Every guider has an energy E, lower is better; for a classifier E = -log p(class | image), and the shift is classifier
guidance (Dhariwal & Nichol 2021) written for the prediction. A guider that looks at the prediction D(x) has its gradient
there, or through the model's Jacobian in x (Chung et al. 2023), which knows how the image can change and costs a backward
pass of the model.
"""
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .guider import Guider, has_network
from .noise import EVERYWHERE, NoiseInterval, as_seen, expand
from .sampling import Denoiser
from .tasks import TASKS

HALF = (torch.float16, torch.bfloat16)
ROUNDING = 1e-6  # of an energy, or of 1 if that is more
PullBack = Callable[[Tensor], Tensor]
log = logging.getLogger(__name__)


def constant(sigma: float) -> float:
    """The ramp that changes nothing."""
    return 1.0


@dataclass(frozen=True)
class Ramp:
    """A factor for the weight that goes from `first` where the window opens (its high end) to `last` where it closes.

    Linear in log sigma; needs a window with two finite, positive ends. first = last = 1 changes nothing.
    """

    window: NoiseInterval
    first: float = 1.0
    last: float = 1.0

    def __post_init__(self):
        if not 0 < self.window.lo < self.window.hi < math.inf:
            raise ValueError(f"a ramp needs a window with two finite, positive ends, got {self.window.lo} and "
                             f"{self.window.hi}")

    def __call__(self, sigma: float) -> float:
        low, high = math.log(self.window.lo), math.log(self.window.hi)
        share = min(max((high - math.log(sigma)) / (high - low), 0.0), 1.0)
        return self.first + share * (self.last - self.first)


@dataclass(frozen=True)
class Term:
    """One guider's part in guidance. weight 0, a sigma outside the window, or a zero mask = not there."""

    guider: Guider
    weight: float = 1.0
    window: NoiseInterval = EVERYWHERE
    ramp: Callable[[float], float] = constant
    mask: Tensor | None = None  # (B|1, 1, H, W) in [0, 1] on the grid of x
    balanced: bool = False      # whether the weight is a share of what is uncertain; else it scales the gradient as it is
    through: bool = False       # whether the gradient in the prediction goes on through the model; the noisy view has none

    @property
    def needs_model(self) -> bool:
        """Whether the model must be differentiated through."""
        return self.through and self.guider.view == "denoised"

    def strength(self, sigma: float) -> float:
        """Weight of the gradient at a noise level; 0 when the network need not run."""
        if sigma not in self.window or (self.mask is not None and not bool(self.mask.any())):
            return 0.0
        return self.weight * self.ramp(sigma)


class Reading(NamedTuple):
    """What one term did at one noise level."""

    term: int         # its place among the terms
    sigma: float
    energy: Tensor    # (B,) before its shift
    rms: Tensor       # (B,) size of its part of the shift, in units of the data, before the limit


class Shift(NamedTuple):
    """What guidance adds to a prediction (B, C, H, W), and what each term at work did."""

    shift: Tensor
    readings: list[Reading]


def guidance_shift(terms: Sequence[Term], x: Tensor, sigma: Tensor, denoised: Tensor, *, sigma_data: float = 0.5,
                   max_rms: float = math.inf, compute: torch.dtype | None = None,
                   pull_back: PullBack | None = None) -> Shift | None:
    """The sum of all terms' shifts, to be added to the denoised prediction, or None where no term is at work.

    x (B, C, H, W): the noisy state image + sigma * noise; sigma (B,), one value; denoised (B, C, H, W): the prediction.
    A guider of the noisy view judges as_seen(x):    -sigma^2 weight dE/dx (the paper; exact for an exact E).
    One of the denoised view judges the prediction:  -r^2 weight dE/d denoised, with the variance of the image given x
    under a Gaussian prior, r^2 = sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2), so that a weight means the same in both;
    with `through`:                                  -sigma^2 weight dE(denoised)/dx, for which pull_back is needed.
    Balanced terms only take the direction of the gradient, for each sample alone: their shift has the root mean square
    weight * r, inside their mask, whatever the scale of the energy: a share of what is still uncertain.

    max_rms: upper limit for the root mean square of the summed shift of each sample, in units of the data; infinity
    changes nothing. compute: the type that the guiders' networks compute in; None or float32 changes nothing.
    pull_back: a gradient in `denoised` -> the gradient in x, as `differentiable` gives it; called once for each such term.
    Works under torch.inference_mode(), as long as the guiders' weights were made outside of it.
    """
    level, total, readings = _common_level(sigma), None, []
    reach = uncertainty(level, sigma_data)
    for index, term in enumerate(terms):
        strength = term.strength(level)
        if strength == 0:
            continue
        energy, gradient = term_gradient(term, x, sigma, denoised, reach, pull_back, compute)
        in_prediction = term.guider.view == "denoised" and not term.needs_model
        part = -strength * (reach if term.balanced else (reach if in_prediction else level) ** 2) * gradient
        readings.append(Reading(index, level, energy, rms(part)))
        total = part if total is None else total + part
    return None if total is None else Shift(_limit(total, max_rms), readings)


def term_gradient(term: Term, x: Tensor, sigma: Tensor, denoised: Tensor, reach: float, pull_back: PullBack | None = None,
                  compute: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Energy (B,) of a term and its gradient inside its mask, (B, C, H, W); of a balanced term only the direction.

    reach: how far the image may still move, as `uncertainty` gives it. The rest: as `guidance_shift` has it.
    """
    energy, gradient = energy_gradient(term.guider, x, sigma, denoised, compute)
    if term.balanced:
        gradient = felt(gradient, energy, reach)
    if term.needs_model:
        gradient = pulled(gradient, pull_back)
    gradient = finite(gradient, term.guider.name, float(sigma[0]))
    mask = None if term.mask is None else mask_for(term.mask, gradient)
    if term.balanced:
        gradient = direction(gradient, mask)
    return energy, gradient if mask is None else gradient * mask


def guided(denoise: Denoiser, terms: Sequence[Term], *, sigma_data: float = 0.5, max_rms: float = math.inf,
           on_shift: Callable[[Shift], None] | None = None) -> Denoiser:
    """A denoiser with guidance: a denoiser again, so that guidance stacks and any sampler takes it."""
    def denoise_guided(x: Tensor, sigma: Tensor) -> Tensor:
        through = needs_model(terms, float(sigma.max()))
        denoised, pull_back = differentiable(denoise, x, sigma) if through else (denoise(x, sigma), None)
        shift = guidance_shift(terms, x, sigma, denoised, sigma_data=sigma_data, max_rms=max_rms, pull_back=pull_back)
        if shift is None:
            return denoised
        if on_shift:
            on_shift(shift)
        return denoised + shift.shift
    return denoise_guided


def needs_model(terms: Sequence[Term], sigma: float) -> bool:
    """Whether terms at work at a noise level need `pull_back`."""
    return any(term.needs_model and term.strength(sigma) != 0 for term in terms)


def differentiable(denoise: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, PullBack]:
    """The prediction (B, C, H, W), and a function that makes a gradient in it a gradient in x: one more pass of the model.

    ValueError if the denoiser lets no gradient through.
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_(True)
        denoised = denoise(point, sigma.detach().clone())
    return denoised.detach(), pull_back_to(point, denoised)


def pull_back_to(x: Tensor, denoised: Tensor) -> PullBack:
    """A gradient in a prediction (B, C, H, W) -> the gradient in the x it was computed from."""
    if not denoised.requires_grad:
        raise ValueError("the denoiser lets no gradient through: give one that computes its prediction without "
                         "torch.no_grad, or do not go through it: through=False in a term, rho=0 in a training-free method")
    return lambda gradient: torch.autograd.grad(denoised, x, gradient.to(denoised), retain_graph=True)[0]


def energy_gradient(guider: Guider, x: Tensor, sigma: Tensor, denoised: Tensor,
                    compute: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Energy (B,) and its gradient in what the guider looks at: x for the noisy view, denoised for the other.

    A batch that does not fit into memory is done in parts: energies are those of single images, so nothing changes.
    """
    start, size, found = 0, len(x), []
    while start < len(x):
        part = slice(start, start + size)
        one = _gradient_if_it_fits(part_of(guider, part, len(x)), x[part], sigma[part], denoised[part], compute)
        if one:
            found.append(one)
            start += size
        elif size == 1:
            raise torch.OutOfMemoryError(f"{guider.name} does not fit into memory with a single image of {x.shape[-1]} x "
                                         f"{x.shape[-2]}: use a smaller network or smaller images, or free memory")
        else:
            log.info("%s runs out of memory with %d images at once: going on with fewer", guider.name, size)
            size = (size + 1) // 2
    energies, gradients = zip(*found, strict=True)
    return torch.cat(energies), torch.cat(gradients)


def part_of(guider: Guider, part: slice, count: int) -> Guider:
    """The guider for a part of a batch of `count` images: what it holds for each image is cut along."""
    cut = {}
    for name in ("target", "prompt"):
        value = getattr(guider, name)
        if value is not None and len(value) not in (1, count):
            raise ValueError(f"the {name} of {guider.name} is for {len(value)} images but {count} are sampled: give one "
                             f"{name} for all, or one for each")
        if value is not None and len(value) > 1:
            cut[name] = value[part]
    return replace(guider, **cut)


def _gradient_if_it_fits(*args) -> tuple[Tensor, Tensor] | None:
    try:
        return _gradient(*args)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
    return None  # only here is the error gone, and with it the half-built graph that its frames hold


def _gradient(guider: Guider, x: Tensor, sigma: Tensor, denoised: Tensor,
              compute: torch.dtype | None) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        point = (x if guider.view == "noisy" else denoised).detach().clone().requires_grad_(True)
        energy, values = _energy_at(guider, point, sigma.detach().clone(), compute)
        scale = _loss_scale(guider, values, compute)
        gradient = torch.autograd.grad(energy.sum() * scale, point)[0] / scale
        return energy.detach(), gradient


def energy_at(guider: Guider, point: Tensor, sigma: Tensor, compute: torch.dtype | None = None) -> Tensor:
    """Energy (B,), at least float32, of the points that the guider looks at, with its network in a type to compute in."""
    return _energy_at(guider, point, sigma, compute)[0]


def _energy_at(guider: Guider, point: Tensor, sigma: Tensor, compute: torch.dtype | None) -> tuple[Tensor, int]:
    """The same, and how many values an image has that the network sees."""
    with _computing_in(compute, guider, point.device.type):
        image = guider.look(as_seen(point, sigma) if guider.view == "noisy" else point, sigma)
        energy = guider.energy(_full(image), sigma)  # a picture is resized in full precision
    return _full(energy), image[0].numel()


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _computing_in(compute: torch.dtype | None, guider: Guider, device: str) -> AbstractContextManager:
    """Half precision where it was asked for; what has no weights, such as a rule, is cheap and stays precise."""
    if compute not in HALF or not has_network(guider) or not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype=compute)


def _loss_scale(guider: Guider, values: int, compute: torch.dtype | None) -> float:
    """Factor of the energy that keeps small gradients from vanishing in float16, whose smallest number is 6e-8."""
    if compute != torch.float16:
        return 1.0
    counted = values if TASKS[guider.task].per_value else 1  # such an energy is that many times larger
    return 2.0 ** (10 - round(math.log2(counted)))


def uncertainty(sigma: float, sigma_data: float) -> float:
    """Standard deviation of the data given a noisy state, under a Gaussian prior."""
    return sigma * sigma_data / math.hypot(sigma, sigma_data)


def pulled(gradient: Tensor, pull_back: PullBack | None) -> Tensor:
    """A gradient in the prediction as one in x; on the way it has a size of 1, which half precision can hold."""
    if pull_back is None:
        raise ValueError("a term's gradient shall go through the model: expected pull_back, as differentiable() gives it")
    size = expand(rms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny), gradient)
    return pull_back(gradient / size).to(gradient) * size


def felt(gradient: Tensor, energy: Tensor, reach: float) -> Tensor:
    """Without the samples whose energy would not feel a step as far as `reach`: their gradient is rounding, no direction."""
    gain = rms(gradient) * reach * gradient[0].numel()
    return gradient * expand(gain > ROUNDING * energy.abs().clamp_min(1), gradient)


def direction(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of each sample with a root mean square of 1, inside the mask; zeros where it vanishes."""
    if mask is None:
        size = rms(gradient)
    else:
        inside = mask.expand_as(gradient)
        size = rms(gradient * inside.sqrt()) / inside.flatten(1).mean(1).sqrt().clamp_min(1e-12)
    return gradient / expand(size.clamp_min(torch.finfo(size.dtype).tiny), gradient)


def _common_level(sigma: Tensor) -> float:
    low, high = (float(value) for value in sigma.aminmax())
    if low != high:
        raise ValueError(f"one call holds noise levels from {low} to {high}: guidance needs one level for the batch")
    return low


def mask_for(mask: Tensor, x: Tensor) -> Tensor:
    if mask.shape[-2:] != x.shape[-2:] or len(mask) not in (1, len(x)):
        raise ValueError(f"the mask has shape {tuple(mask.shape)} but {tuple(x.shape)} is sampled: expected one mask "
                         "for all images or one for each, of the same height and width")
    return mask.to(x)


def finite(part: Tensor, name: str, sigma: float) -> Tensor:
    """Without the samples whose gradient is not a number, so that a fault never blackens an image."""
    bad = ~torch.isfinite(part).flatten(1).all(1)
    if not bool(bad.any()):
        return part
    log.warning("the gradient of %s is not finite at sigma %.4g for %d of %d images: left unguided in this step",
                name, sigma, int(bad.sum()), len(part))
    return torch.where(bad.reshape(-1, *(1,) * (part.ndim - 1)), torch.zeros_like(part), part)


def rms(part: Tensor) -> Tensor:
    return part.square().flatten(1).mean(1).sqrt()


def _limit(shift: Tensor, max_rms: float) -> Tensor:
    if math.isinf(max_rms):
        return shift
    factor = (max_rms / rms(shift).clamp_min(1e-12)).clamp_max(1)
    return shift * expand(factor, shift)
