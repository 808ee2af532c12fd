"""Guidance as a shift of the denoised prediction: one formula for every sampler, because samplers only ever see that.

Every guider has an energy E, lower is better; for a classifier E = -log p(class | image), and the shift is classifier
guidance (Dhariwal & Nichol 2021) written for the prediction. A guider that looks at the prediction D(x) has its gradient
there, or through the model's Jacobian in x (Chung et al. 2023), which knows how the image can change and costs a backward
pass of the model.
"""
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..noise import expand
from ..sampling import Denoiser
from .gradients import Vjp, differentiable, energy_gradient, finite
from .terms import Shift, Term, TermRecord, needs_model

ROUNDING = 1e-6  # of an energy, or of 1 if that is more


def guidance_shift(terms: Sequence[Term], x: Tensor, sigma: Tensor, denoised: Tensor, *, sigma_data: float = 0.5,
                   max_rms: float = math.inf, compute: torch.dtype | None = None,
                   vjp: Vjp | None = None) -> Shift | None:
    """The sum of all terms' shifts, to be added to the denoised prediction, or None where no term is at work.

    x (B, C, H, W): the noisy state image + sigma * noise; sigma (B,), one value; denoised (B, C, H, W): the prediction.
    A guider of the noisy view judges to_vp(x):    -sigma^2 weight dE/dx (the paper; exact for an exact E).
    One of the denoised view judges the prediction:  -r^2 weight dE/d denoised, with the variance of the image given x
    under a Gaussian prior, r^2 = sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2), so that a weight means the same in both;
    with `through`:                                  -sigma^2 weight dE(denoised)/dx, for which vjp is needed.
    Balanced terms only take the direction of the gradient, for each sample alone: their shift has the root mean square
    weight * r, inside their mask, whatever the scale of the energy: a share of what is still uncertain.

    max_rms: upper limit for the root mean square of the summed shift of each sample, in units of the data; infinity
    changes nothing. compute: the type that the guiders' networks compute in; None or float32 changes nothing.
    vjp: a gradient in `denoised` -> the gradient in x, as `differentiable` gives it; called once for each such term.
    Works under torch.inference_mode(), as long as the guiders' weights were made outside of it.
    """
    level, total, records = _common_level(sigma), None, []
    reach = posterior_std(level, sigma_data)
    for index, term in enumerate(terms):
        strength = term.strength(level)
        if strength == 0:
            continue
        energy, gradient = term_gradient(term, x, sigma, denoised, reach, vjp, compute)
        in_prediction = term.guider.view == "denoised" and not term.needs_model
        part = -strength * (reach if term.balanced else (reach if in_prediction else level) ** 2) * gradient
        records.append(TermRecord(index, level, energy, rms(part)))
        total = part if total is None else total + part
    return None if total is None else Shift(_limit(total, max_rms), records)


def term_gradient(term: Term, x: Tensor, sigma: Tensor, denoised: Tensor, reach: float, vjp: Vjp | None = None,
                  compute: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Energy (B,) of a term and its gradient inside its mask, (B, C, H, W); of a balanced term only the direction.

    reach: how far the image may still move, as `uncertainty` gives it. The rest: as `guidance_shift` has it.
    """
    energy, gradient = energy_gradient(term.guider, x, sigma, denoised, compute)
    if term.balanced:
        gradient = drop_negligible_gradients(gradient, energy, reach)
    if term.needs_model:
        gradient = vjp_normalized(gradient, vjp)
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
        denoised, vjp = differentiable(denoise, x, sigma) if through else (denoise(x, sigma), None)
        shift = guidance_shift(terms, x, sigma, denoised, sigma_data=sigma_data, max_rms=max_rms, vjp=vjp)
        if shift is None:
            return denoised
        if on_shift:
            on_shift(shift)
        return denoised + shift.shift
    return denoise_guided


def posterior_std(sigma: float, sigma_data: float) -> float:
    """Standard deviation of the data given a noisy state, under a Gaussian prior."""
    return sigma * sigma_data / math.hypot(sigma, sigma_data)


def vjp_normalized(gradient: Tensor, vjp: Vjp | None) -> Tensor:
    """A gradient in the prediction as one in x; on the way it has a size of 1, which half precision can hold."""
    if vjp is None:
        raise ValueError("a term's gradient shall go through the model: expected vjp, as differentiable() gives it")
    size = expand(rms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny), gradient)
    return vjp(gradient / size).to(gradient) * size


def drop_negligible_gradients(gradient: Tensor, energy: Tensor, reach: float) -> Tensor:
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


def rms(part: Tensor) -> Tensor:
    return part.square().flatten(1).mean(1).sqrt()


def _limit(shift: Tensor, max_rms: float) -> Tensor:
    if math.isinf(max_rms):
        return shift
    factor = (max_rms / rms(shift).clamp_min(1e-12)).clamp_max(1)
    return shift * expand(factor, shift)
