"""Images and masks of ComfyUI, in whatever form other packs hand them over, and those of the core."""
import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)
BYTE = 255
LARGEST_UNIT = 64.0  # largest value of what is no byte: pictures of a high dynamic range and amplified masks exceed 1 too


def image_from_comfy(image: Tensor) -> Tensor:
    """Convert an IMAGE to (B, 3, H, W) in [-1, 1], as a tensor that autograd accepts.

    image: (B, H, W, 3) in [0, 1]. Also taken are one image without a batch, grey ones of one channel or none, ones with
    alpha, which is dropped, and bytes. ValueError for other shapes, for no image, and for values that are no numbers.
    """
    with torch.inference_mode(False):
        colors = _from_bytes(_as_rgb(image.clone()), "image")
        if not colors.isfinite().all():
            raise ValueError("the image has values that are not numbers: expected colours from 0 to 1; the node that made "
                             "it, often a VAE in half precision, has failed: look at it with Preview Image")
        return colors.movedim(-1, 1) * 2 - 1


def image_to_comfy(image: Tensor) -> Tensor:
    """Convert (B, 3, H, W) in [-1, 1] to an IMAGE (B, H, W, 3) in [0, 1]."""
    return ((image.movedim(1, -1).float() + 1) / 2).clamp(0, 1).cpu()


def mask_from_comfy(mask: Tensor) -> Tensor:
    """Convert a MASK to (B, H, W) in [0, 1], as a tensor that autograd accepts.

    mask: (B, H, W) in [0, 1]. Also taken are one mask without a batch, masks with a channel first or last, masks of videos
    (B, 1, T, H, W), whose frames become a batch, and bytes. Values beyond 0 and 1 are cut, and those that are no numbers
    count as 0, which is logged. ValueError for other shapes and for no mask.
    """
    with torch.inference_mode(False):
        mask = _from_bytes(_as_masks(mask.clone()), "mask")
        known = mask.nan_to_num(0.0, 1.0, 0.0)
        if not mask.isfinite().all():
            log.warning("the mask has values that are not numbers: nothing happens there")
        if known.min() < 0 or known.max() > 1:
            log.warning("the mask has values from %.3g to %.3g: they are cut to 0 and 1", known.min(), known.max())
        return known.clamp(0, 1)


def _as_rgb(image: Tensor) -> Tensor:
    """Bring an IMAGE of any known form to (B, H, W, 3)."""
    if image.ndim == 2 or image.ndim == 3 and image.shape[-1] not in (1, 3, 4):
        image = image[..., None]  # grey
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[-1] not in (1, 2, 3, 4) or not image.numel():
        raise ValueError(f"the image has the shape {tuple(image.shape)}: expected at least one image as (batch, height, "
                         "width, 3)")
    return image[..., :3] if image.shape[-1] > 2 else image[..., :1].expand(*image.shape[:-1], 3)


def _as_masks(mask: Tensor) -> Tensor:
    """Bring a MASK of any known form to (B, H, W)."""
    shape = tuple(mask.shape)
    if mask.ndim > 3 and mask.shape[1] == 1:
        mask = mask.flatten(0, -3)
    elif mask.ndim > 2 and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or not mask.numel():
        raise ValueError(f"the mask has the shape {shape}: expected at least one mask as (batch, height, width)")
    return mask


def _from_bytes(values: Tensor, name: str) -> Tensor:
    """Bring bytes from 0 to 255, in whatever type they are, to [0, 1]; leaves other numbers as they are."""
    is_integer, values = not values.is_floating_point(), values if values.is_floating_point() else values.float()
    largest = float(values.nan_to_num(0.0, 0.0).max())
    if largest <= (1 if is_integer else LARGEST_UNIT):
        return values
    log.warning("the %s has values up to %.3g: they are read as bytes, from 0 to 255", name, largest)
    return values / BYTE
