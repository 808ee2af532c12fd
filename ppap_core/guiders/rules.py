"""Guiders without a network: what can be measured in any picture. Nothing to download, nothing to train.

Each rule reads features (B, ...) from images (B, 3, H, W) in [-1, 1] and compares them by squared error. The energy counts
once for each value of the image, so that a weight means the same at every size, and the rules are scaled so that it means
nearly the same for each of them: 4 moves images clearly, 16 most of the way. Sharpness and smoothness are about pixels next
to one another: what they want of a picture depends on its size.
"""
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..viz.plots import depth_picture
from ..viz.previews import color_stripes, enlarged
from .guider import Guider
from .preprocess import Preprocess


def grey(image: Tensor) -> Tensor:
    """Mean of the three colours, (B, 1, H, W) in [-1, 1]: to make it lighter tints nothing, unlike with luma."""
    return image.mean(1, keepdim=True)


def brightness(image: Tensor) -> Tensor:
    """Mean brightness from 0, black, to 1, white, (B, 1)."""
    return (grey(image).mean((2, 3)) + 1) / 2


def contrast(image: Tensor) -> Tensor:
    """Spread of the brightness, (B, 1): 0 is flat, 0.5 is half black and half white."""
    return (grey(image).flatten(1).var(1, keepdim=True, unbiased=False) + 1e-12).sqrt() / 2


def saturation(image: Tensor) -> Tensor:
    """Mean distance of the colours from grey, (B, 1): 0 is without colour."""
    return ((image - grey(image)).square().mean(1).flatten(1) + 1e-12).sqrt().mean(1, keepdim=True)


def sharpness(image: Tensor) -> Tensor:
    """Root mean square of what a blur over nine pixels takes from the brightness, (B, 1).

    0 is blurred; photographs have 0.05 to 0.1.
    """
    kernel = image.new_tensor([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 256
    wide = F.pad(grey(image), (4, 4, 4, 4), mode="replicate")
    detail = grey(image) - F.conv2d(wide, (kernel[:, None] * kernel)[None, None])
    return (detail.square().flatten(1).mean(1, keepdim=True) + 1e-12).sqrt()


DIRECTIONS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, -1, 0), (0, 1, -1), (1, 0, -1), (1, -2, 1))


def colors(image: Tensor, shares: int = 64) -> Tensor:
    """The distribution of colours, wherever they are, (B, 8, 64): sorted along eight directions, in equal shares.

    The squared difference of two is their sliced Wasserstein distance (Rabin et al. 2011).
    """
    directions = F.normalize(image.new_tensor(DIRECTIONS), dim=1)
    along = (directions @ image.flatten(2)).sort(dim=2).values
    return F.adaptive_avg_pool1d(along, shares)


def layout(image: Tensor, cells: int = 8) -> Tensor:
    """The image in cells: where it is light or dark and of which colour, (B, 3, 8, 8).

    Each cell fades into its neighbours, so that no grid is drawn into what it steers.
    """
    return shrink(image, cells)


def edges(image: Tensor, size: int = 64) -> Tensor:
    """How strong the edges are in each place, (B, 1, 64, 64)."""
    small = shrink(grey(image), size)
    across = image.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None] / 2
    padded = F.pad(small, (1, 1, 1, 1), mode="replicate")
    return (F.conv2d(padded, across).square() + F.conv2d(padded, across.mT).square() + 1e-6).sqrt()


def shrink(image: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), smoothly. On CUDA torch reaches across at most 94 pixels for one: what is larger
    is averaged down first."""
    sides = tuple(min(side, 64 * size) for side in image.shape[-2:])
    return F.interpolate(F.adaptive_avg_pool2d(image, sides), (size, size), mode="bilinear", antialias=True)


def left_right(image: Tensor) -> Tensor:
    """What differs between the image and its mirror image, each pair of pixels counted once."""
    return (image - image.flip(3)) / 2**0.5


def top_bottom(image: Tensor) -> Tensor:
    """What differs between the image and its upside-down one, each pair of pixels counted once."""
    return (image - image.flip(2)) / 2**0.5


def half_turn(image: Tensor) -> Tensor:
    """What differs between the image and itself turned by 180 degrees, each pair of pixels counted once."""
    return (image - image.flip((2, 3))) / 2**0.5


def seams(image: Tensor) -> Tensor:
    """How the image goes on across its border when it is laid beside itself, less how it goes on inside, (B, n)."""
    def seam(x: Tensor) -> Tensor:  # across the last axis: value and slope shall go on
        step = x[..., :1] - x[..., -1:]
        slope = (x[..., 1:2] - x[..., :1] + x[..., -1:] - x[..., -2:-1]) / 2
        return (step - slope).flatten(1)
    seam_values = torch.cat([seam(image), seam(image.mT)], dim=1)
    return seam_values * (seam_values.shape[1] / image[0].numel()) ** 0.5  # each value at the border counts once


def roughness(image: Tensor) -> Tensor:
    """Differences between neighbouring pixels as roots, (B, 3, H, W): their energy is a quarter of the total variation."""
    right, down = F.pad(image.diff(dim=3), (0, 1)), F.pad(image.diff(dim=2), (0, 0, 0, 1))
    return ((right.square() + down.square() + 1e-6).sqrt() / 2).sqrt()


class Rule(NamedTuple):
    """What a rule measures and how it is aimed."""

    read: Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> features (B, ...)
    aim: Literal["image", "number", "itself"]  # the features of another image; a number; "itself": the target is zero
    preview: Callable[[Tensor, Tensor], Tensor] | None = None  # (images, features) -> pictures; None: as its task is shown


def _edge_preview(images: Tensor, strengths: Tensor) -> Tensor:
    return depth_picture(strengths)


RULES: dict[str, Rule] = {
    "colours": Rule(colors, "image", color_stripes),
    "layout": Rule(layout, "image", enlarged),
    "edges": Rule(edges, "image", _edge_preview),
    "brightness": Rule(brightness, "number"), "contrast": Rule(contrast, "number"),
    "saturation": Rule(saturation, "number"), "sharpness": Rule(sharpness, "number"),
    "symmetry left-right": Rule(left_right, "itself"), "symmetry top-bottom": Rule(top_bottom, "itself"),
    "symmetry half turn": Rule(half_turn, "itself"), "seamless tiling": Rule(seams, "itself"),
    "smoothness": Rule(roughness, "itself"),
}
"""Name of a rule, as saved workflows have it -> the rule."""


class RuleNet(nn.Module):
    """A rule as net(image, sigma)."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule = rule

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        return self.rule.read(image)


def rule_guider(name: str) -> Guider:
    """The guider of a rule, a key of RULES. ValueError for another name."""
    if name not in RULES:
        raise ValueError(f"there is no rule '{name}': expected one of {', '.join(RULES)}")
    rule = RULES[name]
    guider = Guider(f"rule/{name}", RuleNet(rule), Preprocess((1, 1), fit="own"),
                    "number" if rule.aim == "number" else "features")
    return guider.aim(torch.zeros(1, 1)) if rule.aim == "itself" else guider
