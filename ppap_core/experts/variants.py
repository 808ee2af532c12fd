"""Variants of images: in a mirror and shifted, with the states and predictions that led to them.

A network that answers to each variant by itself is imitated better from few images, which otherwise are learned by heart
(Beyer et al. 2022, on function matching).
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 16_384  # images and variants of them, up to which all variants are used


class Variant(NamedTuple):
    """How an image is changed. Neutral: the defaults."""

    mirrored: bool = False  # left and right exchanged, before the shift
    down: float = 0.0       # shift, in shares of the height; what is beyond the border is a mirror image of what is within
    right: float = 0.0      # shift, in shares of the width


SHIFTS = ((0.0, 0.0), (1 / 8, 1 / 16), (-1 / 16, 1 / 8), (-1 / 16, -1 / 8))
VARIANTS = tuple(Variant(mirrored, *shift) for shift in SHIFTS for mirrored in (False, True))
"""The first changes nothing."""


def variants_for(images: int) -> tuple[Variant, ...]:
    """Variants of each of so many images to learn from: all of few, a mirror image at least of any number."""
    return VARIANTS[:max(2, min(FEW // max(images, 1), len(VARIANTS)))]


def vary(images: Tensor, variant: Variant) -> Tensor:
    """A variant of images or latents (B, C, h, w); of latents it is that of their images, to half a value."""
    images = images.flip(-1) if variant.mirrored else images
    if not variant.down and not variant.right:
        return images
    height, width = images.shape[-2:]
    return images[..., _shifted(height, variant.down)[:, None], _shifted(width, variant.right)]


def _shifted(size: int, share: float) -> Tensor:
    """Where each place along an axis comes from, (size,)."""
    places = (torch.arange(size) - round(share * size)).abs()
    return torch.where(places < size, places, 2 * (size - 1) - places)


def vary_each(images: Tensor, variants: Sequence[Variant], chosen: Tensor) -> Tensor:
    """The chosen variant of each of some images or latents (B, C, h, w). chosen: numbers of variants, (B,) long."""
    if len(variants) == 1:
        return vary(images, variants[0])
    varied = images.clone()
    for number, variant in enumerate(variants):
        places = (chosen == number).nonzero()[:, 0]
        varied[places] = vary(images[places], variant)
    return varied
