"""Energies of guiders and their gradients, in the prediction or through the diffusion model."""
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..guiders.guider import Guider, has_network
from ..guiders.tasks import TASKS
from ..noise import to_vp
from ..sampling import Denoiser

HALF = (torch.float16, torch.bfloat16)
Vjp = Callable[[Tensor], Tensor]
log = logging.getLogger(__name__)


def differentiable(denoise: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Vjp]:
    """The prediction (B, C, H, W), and a function that makes a gradient in it a gradient in x: one more pass of the model.

    ValueError if the denoiser lets no gradient through.
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_(True)
        denoised = denoise(point, sigma.detach().clone())
    return denoised.detach(), make_vjp(point, denoised)


def make_vjp(x: Tensor, denoised: Tensor) -> Vjp:
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
        image = guider.to_image(to_vp(point, sigma) if guider.view == "noisy" else point, sigma)
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
    counted = values if TASKS[guider.task].sum_over_pixels else 1  # such an energy is that many times larger
    return 2.0 ** (10 - round(math.log2(counted)))


def finite(part: Tensor, name: str, sigma: float) -> Tensor:
    """Without the samples whose gradient is not a number, so that a fault never blackens an image."""
    bad = ~torch.isfinite(part).flatten(1).all(1)
    if not bool(bad.any()):
        return part
    log.warning("the gradient of %s is not finite at sigma %.4g for %d of %d images: left unguided in this step",
                name, sigma, int(bad.sum()), len(part))
    return torch.where(bad.reshape(-1, *(1,) * (part.ndim - 1)), torch.zeros_like(part), part)
