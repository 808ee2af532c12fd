"""Guidance as a shift of the denoised prediction: one formula for every sampler, because samplers only ever see that.

A guider has an energy E, lower is better. For a classifier E = -log p(class | image), and the shift is classifier guidance
(Dhariwal & Nichol 2021) written for the prediction. A guider that judges the prediction D(x) has its gradient there; going
back through the denoiser to x (Chung et al. 2023) takes into account how the image can change, for one backward pass of the
model. `terms` holds the parts that are summed here, `gradients` their energies and derivatives.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import PIXEL_SIGMA_DATA, expand
from ..sampling import Denoiser
from .gradients import Prediction, Vjp, is_finite, predict, rms
from .precision import RunState, TermGradient
from .terms import Term, TermRecord, any_needs_vjp

SMALLER_SCALE = 2.0**-10  # of a gradient that overflows on its way back through a model of half precision
ROUNDING = 1e-6  # share of an energy, or of 1 if that is larger, below which a change of it is rounding


class Guidance(NamedTuple):
    """The change of a prediction by guidance, delta (B, C, H, W), and a record for each term that acted."""

    delta: Tensor
    records: list[TermRecord]


@dataclass(frozen=True)
class GuidanceSettings:
    """Settings that all terms share."""

    sigma_data: float = PIXEL_SIGMA_DATA      # standard deviation of the data: 0.5 for pixels, 1 for latents
    max_rms: float = math.inf                 # limit of the summed shift's rms for each image, in data units; inf: none
    compute_dtype: torch.dtype | None = None  # type that the guiders' networks compute in; None or float32: as they are
    run: RunState | None = None               # memory of a run for calls that belong together; None: each is on its own


def guidance_shift(terms: Sequence[Term], prediction: Prediction,
                   settings: GuidanceSettings = GuidanceSettings()) -> Guidance | None:
    """The sum of all terms' shifts of a prediction, or None where no term acts.

    terms: their order is the index in the records. prediction: one noise level for the whole batch; its vjp is called once
    for each term that goes back through the model. With w the weight at this level and r the posterior standard deviation,
    the shift of a term is

        -sigma^2 w dE/dx          for a guider of the noisy view (Go et al. 2023; exact for an exact E)
        -r^2 w dE/dD              for a guider of the denoised view, so that a weight means the same in both views
        -sigma^2 w dE(D(x))/dx    for a guider of the denoised view, with backprop_through_model
        -r w g                    for a normalized term: g is the direction of its gradient, with rms 1 inside the mask

    and with n sub-steps the sum of n such shifts of weight w / n, each with the gradient at the prediction that the ones
    before it led to: without another pass of the denoiser, whose vjp is called once for each.

    Works under torch.inference_mode(), as long as the guiders' weights were made outside it.
    ValueError for several noise levels, for a mask of another size and where a vjp is missing.
    """
    sigma, deltas, records = _single_level(prediction.sigma), [], []
    settings = replace(settings, run=settings.run or RunState())
    for index, term in enumerate(terms):
        weight = term.weight_at(sigma)
        if weight == 0:
            continue
        results, delta = _term_shift(term, weight, prediction, settings, index)
        unguided, fallback = max(result.unguided for result in results), results[-1].fallback
        records.append(TermRecord(index, sigma, results[0].energy, rms(delta), unguided, fallback))
        deltas.append(delta)
    return Guidance(_limit_rms(sum(deltas[1:], deltas[0]), settings.max_rms), records) if deltas else None


def _term_shift(term: Term, weight: float, prediction: Prediction, settings: GuidanceSettings,
                index: int) -> tuple[list[TermGradient], Tensor]:
    """What a term saw of the prediction, for each part of its shift, and the whole shift."""
    factor = -weight / term.parts * _step_size(term, float(prediction.sigma[0]), settings.sigma_data)
    results = [term_gradient(term, prediction, settings, index)]
    delta = factor * results[0].gradient
    for _ in range(term.parts - 1):
        moved = replace(prediction, denoised=prediction.denoised + delta)
        results.append(term_gradient(term, moved, settings, index))
        delta = delta + factor * results[-1].gradient
    return results, delta


def term_gradient(term: Term, prediction: Prediction, settings: GuidanceSettings, index: int = 0) -> TermGradient:
    """Energy (B,) of a term and its masked gradient (B, C, H, W), reduced to a direction of rms 1 if the term is normalized.

    The gradient is in x for a guider of the noisy view and for backprop_through_model, in the prediction otherwise. Images
    whose gradient is not finite get zeros, and are counted. index: of the term, by which settings.run remembers it.
    """
    run, sigma, name = settings.run or RunState(), float(prediction.sigma[0]), term.guider.name
    point = prediction.x if term.guider.view == "noisy" else prediction.denoised
    energy, gradient, fallback, _ = run.energy_gradient(index, term.guider, point, prediction.sigma, settings.compute_dtype)
    unguided = ~is_finite(gradient)
    gradient = run.zero_nonfinite(gradient, name, sigma)
    if term.normalized:
        gradient = drop_negligible_gradients(gradient, energy, posterior_std(sigma, settings.sigma_data))
    if term.needs_vjp:
        gradient = vjp_at_unit_scale(gradient, prediction.vjp)
        unguided |= ~is_finite(gradient)
        gradient = run.zero_nonfinite(gradient, name, sigma)
    mask = None if term.mask is None else checked_mask(term.mask, gradient)
    if term.normalized:
        gradient = direction(gradient, mask)
    return TermGradient(energy, gradient if mask is None else gradient * mask, fallback, int(unguided.sum()))


def guided(denoise: Denoiser, terms: Sequence[Term], settings: GuidanceSettings = GuidanceSettings(),
           on_guidance: Callable[[Guidance], None] | None = None) -> Denoiser:
    """A denoiser with guidance: a denoiser again, so that guidance stacks and any sampler takes it.

    denoise: must let gradients through if a term has backprop_through_model. on_guidance: called with what is added to each
    prediction.
    """
    settings = replace(settings, run=settings.run or RunState())

    def denoise_guided(x: Tensor, sigma: Tensor) -> Tensor:
        prediction = predict(denoise, x, sigma, any_needs_vjp(terms, float(sigma.max())))
        guidance = guidance_shift(terms, prediction, settings)
        if guidance is None:
            return prediction.denoised
        if on_guidance:
            on_guidance(guidance)
        return prediction.denoised + guidance.delta
    return denoise_guided


def posterior_std(sigma: float, sigma_data: float) -> float:
    """Standard deviation of the clean data given a noisy state, r = sigma sigma_data / sqrt(sigma^2 + sigma_data^2).

    Exact for Gaussian data. sigma: noise level; sigma_data: standard deviation of the data; r has the data's unit.
    """
    return sigma * sigma_data / math.hypot(sigma, sigma_data)


def _step_size(term: Term, sigma: float, sigma_data: float) -> float:
    """Factor of a weighted gradient."""
    std = posterior_std(sigma, sigma_data)
    if term.normalized:
        return std
    return (std if term.guider.view == "denoised" and not term.needs_vjp else sigma) ** 2


def vjp_at_unit_scale(gradient: Tensor, vjp: Vjp | None) -> Tensor:
    """The gradient in x (B, C, H, W) from one in the prediction, computed at rms 1, which half precision can hold."""
    if vjp is None:
        raise ValueError("a term goes back through the model, but the prediction has no vjp: make it by predict() "
                         "with with_vjp=True")
    scale = expand(rms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny), gradient)
    pulled = vjp(gradient / scale).to(gradient)
    fits = is_finite(pulled)
    if not bool(fits.all()):
        smaller = vjp(SMALLER_SCALE * gradient / scale).to(gradient) / SMALLER_SCALE
        pulled = torch.where(expand(fits, pulled) > 0, pulled, smaller)
    return pulled * scale


def drop_negligible_gradients(gradient: Tensor, energy: Tensor, std: float) -> Tensor:
    """Zero gradients (B, C, H, W) whose effect on the energy (B,) over a step of rms `std` is rounding, not a direction."""
    gain = rms(gradient) * std * gradient[0].numel()
    return gradient * expand(gain > ROUNDING * energy.abs().clamp_min(1), gradient)


def direction(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient (B, C, H, W) scaled for each image to rms 1 inside the mask; zeros where it vanishes."""
    if mask is None:
        size = rms(gradient)
    else:
        inside = mask.expand_as(gradient)
        size = rms(gradient * inside.sqrt()) / inside.flatten(1).mean(1).sqrt().clamp_min(1e-12)
    return gradient / expand(size.clamp_min(torch.finfo(size.dtype).tiny), gradient)


def checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask (B|1, 1, H, W) in the type and on the device of x (B, C, H, W). ValueError if it does not fit x."""
    if mask.shape[-2:] != x.shape[-2:] or len(mask) not in (1, len(x)):
        raise ValueError(f"the mask has shape {tuple(mask.shape)} but {tuple(x.shape)} is sampled: expected one mask "
                         "for all images or one for each, of the same height and width")
    return mask.to(x)


def _single_level(sigma: Tensor) -> float:
    low, high = (float(value) for value in sigma.aminmax())
    if low != high:
        raise ValueError(f"one call holds noise levels from {low} to {high}: guidance needs one level for the batch")
    return low


def _limit_rms(delta: Tensor, max_rms: float) -> Tensor:
    if math.isinf(max_rms):
        return delta
    factor = (max_rms / rms(delta).clamp_min(1e-12)).clamp_max(1)
    return delta * expand(factor, delta)
