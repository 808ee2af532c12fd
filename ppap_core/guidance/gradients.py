"""Predictions of a denoiser, energies of guiders, and the gradients of both."""
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..guiders.guider import Guider, has_network
from ..guiders.tasks import TASKS
from ..guiders.variety import VarietyGuider
from ..noise import expand, to_vp
from ..sampling import Denoiser

HALF = (torch.float16, torch.bfloat16)
SMALLEST_SCALED = 2.0**-8  # largest value of a gradient in float16 below which small ones lose their digits (from 2^-14 on)
SCALE_STEP, SCALE_TRIES = 2.0**8, 4
Vjp = Callable[[Tensor], Tensor]
"""Gradient in a prediction (B, C, H, W) -> gradient in the x that it was computed from: one backward pass of the model."""

Judge = Callable[[Guider, Tensor, Tensor, torch.dtype | None], tuple[Tensor, ...]]
"""(guider, point, sigma, type to compute in) -> energy (B,), and what else is found of each image"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """A noisy state and the clean image that a denoiser expects for it."""

    x: Tensor               # (B, C, H, W), image + sigma * noise
    sigma: Tensor           # (B,)
    denoised: Tensor        # (B, C, H, W)
    vjp: Vjp | None = None  # needed by what goes back through the model only


def predict(denoise: Denoiser, x: Tensor, sigma: Tensor, with_vjp: bool = False) -> Prediction:
    """The prediction for x (B, C, H, W) at sigma (B,).

    with_vjp: whether its gradient in x will be asked for, which keeps the model's activations; also possible under
    torch.inference_mode() and torch.no_grad(). ValueError if the denoiser then lets no gradient through.
    """
    if not with_vjp:
        return Prediction(x, sigma, denoise(x, sigma))
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_(True)
        denoised = denoise(point, sigma.detach().clone())
    if not denoised.requires_grad:
        raise ValueError("the denoiser lets no gradient through: give one that computes its prediction without "
                         "torch.no_grad, or do not go back through it: backprop_through_model=False in a term or a prior, "
                         "rho=0 in a training-free method")
    return Prediction(x, sigma, denoised.detach(), partial(_backpropagate, point, denoised))


def _backpropagate(x: Tensor, denoised: Tensor, gradient: Tensor) -> Tensor:
    return torch.autograd.grad(denoised, x, gradient.to(denoised), retain_graph=True)[0]


def energy_gradient(guider: Guider, point: Tensor, sigma: Tensor,
                    compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Energy (B,) of what a guider looks at, and its gradient there (B, C, H, W).

    point (B, C, H, W): the noisy state x for the noisy view, the prediction for the denoised view; sigma (B,).
    compute_dtype: type that the network computes in; None or float32 changes nothing.
    A batch that does not fit into memory is done in parts, which changes no result: each image has its own energy, and a
    guider of variety is told of the others.
    torch.OutOfMemoryError if a single image does not fit.
    """
    energies, gradients = zip(*_in_parts(_gradient, guider, point, sigma, compute_dtype), strict=True)
    return torch.cat(energies), torch.cat(gradients)


@torch.no_grad()
def energy_alone(guider: Guider, point: Tensor, sigma: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Energy (B,) of what a guider looks at, for guiders that no gradient passes, too.

    The arguments, the parts of a batch and the error are those of `energy_gradient`.
    """
    return torch.cat([energy for [energy] in _in_parts(_energy_only, guider, point, sigma, compute_dtype)])


def _in_parts(judge: Judge, guider: Guider, point: Tensor, sigma: Tensor,
              compute_dtype: torch.dtype | None) -> list[tuple[Tensor, ...]]:
    start, size, parts = 0, len(point), []
    while start < len(point):
        part = slice(start, start + size)
        result = _result_if_it_fits(judge, slice_guider(guider, part, len(point)), point[part], sigma[part], compute_dtype)
        if result:
            parts.append(result)
            start += size
        elif size == 1:
            raise torch.OutOfMemoryError(f"{guider.name} does not fit into memory with a single image of "
                                         f"{point.shape[-1]} x {point.shape[-2]}: use a smaller network or smaller images, "
                                         "or free memory")
        else:
            log.info("%s runs out of memory with %d images at once: continuing with fewer", guider.name, size)
            size = (size + 1) // 2
            guider = _among_batch(guider, point, sigma, compute_dtype, size)
    return parts


@torch.no_grad()
def _among_batch(guider: Guider, point: Tensor, sigma: Tensor, compute_dtype: torch.dtype | None, size: int) -> Guider:
    """The guider for parts of a batch, if it is one that judges images by the others."""
    if not isinstance(guider, VarietyGuider):
        return guider
    outputs = []
    for start in range(0, len(point), size):
        part = slice(start, start + size)
        seeing, image = _seen(slice_guider(guider, part, len(point)), point[part], sigma[part], compute_dtype)
        outputs.append(seeing.predict(image, sigma[part]))
    return guider.among(torch.cat(outputs))


def slice_guider(guider: Guider, part: slice, batch_size: int) -> Guider:
    """The guider for a part of a batch: targets and prompts that differ between images are sliced, and so is a decoder.

    batch_size: number of images of the whole batch. ValueError for a target or prompt of another number of images.
    """
    for name, value in (("target", guider.target), ("prompt", guider.prompt)):
        if value is not None and len(value) not in (1, batch_size):
            raise ValueError(f"the {name} of {guider.name} is for {len(value)} images but {batch_size} are sampled: give "
                             f"one {name} for all, or one for each")
    return replace(guider, target=_slice(guider.target, part), prompt=_slice(guider.prompt, part),
                   decode=slice_decoder(guider.decode, part))


def _slice(value: Tensor | None, part: slice) -> Tensor | None:
    return value if value is None or len(value) == 1 else value[part]


def slice_decoder(decode: Any, part: slice) -> Any:
    """A decoder for a part of a batch, if it is one that knows the others of the batch; others stay as they are."""
    return decode.sliced(part) if hasattr(decode, "sliced") else decode


def _result_if_it_fits(judge: Judge, guider: Guider, point: Tensor, sigma: Tensor,
                       compute_dtype: torch.dtype | None) -> tuple[Tensor, ...] | None:
    try:
        return judge(guider, point, sigma, compute_dtype)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
    return None  # after the except clause the error is gone, and with it the half-built graph that its frames hold


def _gradient(guider: Guider, point: Tensor, sigma: Tensor, compute_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        point = point.detach().clone().requires_grad_(True)
        energy, values = _energy_and_image_size(guider, point, sigma.detach().clone(), compute_dtype)
        if compute_dtype != torch.float16:
            return energy.detach(), torch.autograd.grad(energy.sum(), point)[0]
        return energy.detach(), _scaled_gradient(energy, point, _loss_scale(guider, values))


def _energy_only(guider: Guider, point: Tensor, sigma: Tensor, compute_dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    return (energy_at(guider, point, sigma, compute_dtype),)


def energy_at(guider: Guider, point: Tensor, sigma: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Energy (B,), at least float32, of what a guider looks at; differentiable.

    point (B, C, H, W): the noisy state x for the noisy view, the prediction for the denoised view; sigma (B,).
    compute_dtype: type that the network computes in; None or float32 changes nothing.
    """
    return _energy_and_image_size(guider, point, sigma, compute_dtype)[0]


def _energy_and_image_size(guider: Guider, point: Tensor, sigma: Tensor,
                           compute_dtype: torch.dtype | None) -> tuple[Tensor, int]:
    guider, image = _seen(guider, point, sigma, compute_dtype)
    return _at_least_float32(guider.energy(image, sigma)), image[0].numel()


def _seen(guider: Guider, point: Tensor, sigma: Tensor, compute_dtype: torch.dtype | None) -> tuple[Guider, Tensor]:
    """The guider as it computes, and the image that it looks at."""
    image = guider.to_image(to_vp(point, sigma) if guider.view == "noisy" else point, sigma)
    if compute_dtype in HALF and has_network(guider) and torch.amp.is_autocast_available(point.device.type):
        guider = replace(guider, net=Autocast(guider.net, compute_dtype, point.device.type))
    return guider, _at_least_float32(image)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


@dataclass(frozen=True)
class Autocast:
    """A network that computes in half precision, and nothing else: what decodes, resizes and compares has its own type."""

    net: Callable[..., Tensor]
    dtype: torch.dtype
    device: str

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=self.dtype):
            return self.net(*inputs)


def _loss_scale(guider: Guider, values: int) -> float:
    """Factor of the energy to begin with in float16: a gradient then neither vanishes nor overflows in most networks."""
    summed = values if TASKS[guider.task].sum_over_pixels else 1  # such an energy is that many times larger
    return 2.0 ** (10 - round(math.log2(summed)))


def _scaled_gradient(energy: Tensor, point: Tensor, scale: float) -> Tensor:
    """Gradient of energies (B,), each scaled by a power of two so that float16 can hold what passes on the way.

    An image whose gradient overflows is done again with a smaller scale, one whose gradient nearly vanishes with a larger.
    """
    scales = torch.full_like(energy.detach(), scale)
    result = torch.full_like(point, math.nan)
    for _ in range(SCALE_TRIES):
        gradient = torch.autograd.grad((energy * scales).sum(), point, retain_graph=True)[0]
        largest = gradient.abs().flatten(1).amax(1)
        fits = is_finite(gradient)
        result = torch.where(fits.reshape(-1, *(1,) * (point.ndim - 1)), gradient / expand(scales, gradient), result)
        too_small = fits & (largest < SMALLEST_SCALED)
        too_large = energy.isfinite() & ~is_finite(result)
        if not bool((too_small | too_large).any()):
            break
        scales = torch.where(too_small, scales * SCALE_STEP, torch.where(too_large, scales / SCALE_STEP, scales))
    return result


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all values of each image are finite, (B, ...) -> (B,)."""
    return tensor.isfinite().flatten(1).all(1)


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of each image, (B, ...) -> (B,)."""
    return tensor.square().flatten(1).mean(1).sqrt()
