"""Resizing of images, maps and masks: one function, with a gradient on every device."""
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]

MAX_SHRINK = 40  # factor up to which torch's antialiased kernels are used; on CUDA they refuse some 47 (bicubic) or 94
CUBIC = -0.5     # Keys' parameter (1981), as PIL and torch's antialiased bicubic filter have it

log = logging.getLogger(__name__)


def resize(image: Tensor, size: Size, mode: str = "bilinear", antialias: bool = True, align_corners: bool = False) -> Tensor:
    """Resize images, maps or masks (B, C, h, w) to (B, C, *size); a size that they have already changes nothing.

    mode: "bilinear", "bicubic" or "nearest-exact". antialias: average over all that a smaller pixel covers; torch does it
    where it can, and matrices with the same weights do where it cannot: on devices that have no such kernel, or no gradient
    of it, and for factors that are too large for it. align_corners: keep the centres of the corner pixels in their places.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if mode == "nearest-exact":
        return F.interpolate(image, size, mode=mode)
    if not antialias:
        return F.interpolate(image, size, mode=mode, align_corners=align_corners)
    return _Antialiased.apply(image, tuple(size), mode, align_corners)


def resize_labels(labels: Tensor, size: Size) -> Tensor:
    """Resize a label map (B, h, w) of integers to (B, *size), without mixing labels; a size that fits changes nothing."""
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    return resize(labels[:, None].float(), size, "nearest-exact")[:, 0].to(labels.dtype)  # float32 holds all up to 2^24


def without_autocast(device: str) -> AbstractContextManager:
    """Context in which a kind of device computes in the types of its tensors."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _Antialiased(torch.autograd.Function):
    """Antialiased resizing whose forward and backward pass each fall back to matrices."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, size: Size, mode: str, align_corners: bool) -> Tensor:
        ctx.before, ctx.size, ctx.mode, ctx.align_corners = tuple(image.shape), size, mode, align_corners
        if _is_in_reach(ctx):
            try:
                return F.interpolate(image, size, mode=mode, antialias=True, align_corners=align_corners)
            except NotImplementedError:
                _say_once(image.device.type, mode)
        rows, columns = _matrices(ctx, image)
        with without_autocast(image.device.type):
            return rows @ image @ columns.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        if _is_in_reach(ctx):
            kernel = getattr(torch.ops.aten, f"_upsample_{ctx.mode}2d_aa_backward")
            try:
                return kernel(gradient, ctx.size, ctx.before, ctx.align_corners, None, None), None, None, None
            except NotImplementedError:
                _say_once(gradient.device.type, ctx.mode)
        rows, columns = _matrices(ctx, gradient)
        with without_autocast(gradient.device.type):
            return rows.mT @ gradient @ columns, None, None, None


def _is_in_reach(ctx: Any) -> bool:
    return all(before <= MAX_SHRINK * after for before, after in zip(ctx.before[-2:], ctx.size, strict=True))


@cache
def _say_once(device: str, mode: str) -> None:
    log.warning("torch has no antialiased %s resizing, or no gradient of it, on %s: it is done by matrices there, which "
                "gives the same result a little slower", mode, device)


def _matrices(ctx: Any, like: Tensor) -> list[Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        return [_weights(before, after, ctx, like.device).to(like.dtype)
                for before, after in zip(ctx.before[-2:], ctx.size, strict=True)]


def _weights(before: int, after: int, ctx: Any, device: torch.device) -> Tensor:
    """Weights (after, before) by which one side is resized: a filter as wide as a new pixel, cut at the border."""
    scale = before / after if not ctx.align_corners else (before - 1) / (after - 1) if after > 1 else 0.0
    # torch's antialiased filters place the centres so for aligned corners too
    centers = (torch.arange(after, device=device) + 0.5) * scale - 0.5
    distance = ((torch.arange(before, device=device) - centers[:, None]) / max(scale, 1.0)).abs()
    weights = _triangle(distance) if ctx.mode == "bilinear" else _cubic(distance)
    return weights / weights.sum(1, keepdim=True)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_min(0)


def _cubic(distance: Tensor) -> Tensor:
    """Cubic convolution (Keys 1981)."""
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
