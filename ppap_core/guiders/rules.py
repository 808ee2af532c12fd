"""Rules: guiders without a network, which measure something in any picture. Nothing to download, nothing to train.

Each rule reads features (B, ...) from images (B, 3, H, W) in [-1, 1] and compares them by squared error. The energy is the
mean times the number of values of the image, so that a weight means the same at every size, and the rules are scaled so
that it means nearly the same for each of them: 4 moves images clearly, 16 most of the way. Sharpness and smoothness compare
neighbouring pixels: their effect depends on the size of the picture.

A new rule is one function and one row of `RULES`; the place of the row in the table does not matter.
"""
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..viz.colors import depth_picture
from ..viz.previews import color_stripes, enlarged
from .guider import Guider
from .preprocess import Preprocess
from .resize import resize


def grey(image: Tensor) -> Tensor:
    """Mean of the three colours, (B, 1, H, W) in [-1, 1]. Unlike luma, it can be raised without a tint."""
    return image.mean(1, keepdim=True)


def brightness(image: Tensor) -> Tensor:
    """Mean brightness, (B, 1): 0 is black, 1 is white."""
    return (grey(image).mean((2, 3)) + 1) / 2


def contrast(image: Tensor) -> Tensor:
    """Standard deviation of the brightness, (B, 1): 0 is flat, 0.5 is half black and half white."""
    return (grey(image).flatten(1).var(1, keepdim=True, unbiased=False) + 1e-12).sqrt() / 2


def saturation(image: Tensor) -> Tensor:
    """Mean distance of the colours from grey, (B, 1): 0 is without colour."""
    return ((image - grey(image)).square().mean(1).flatten(1) + 1e-12).sqrt().mean(1, keepdim=True)


def sharpness(image: Tensor) -> Tensor:
    """Root mean square of the detail that a blur over nine pixels removes, (B, 1).

    0 is blurred; photographs have 0.05 to 0.1.
    """
    kernel = image.new_tensor([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 256
    wide = F.pad(grey(image), (4, 4, 4, 4), mode="replicate")
    detail = grey(image) - F.conv2d(wide, (kernel[:, None] * kernel)[None, None])
    return (detail.square().flatten(1).mean(1, keepdim=True) + 1e-12).sqrt()


DIRECTIONS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, -1, 0), (0, 1, -1), (1, 0, -1), (1, -2, 1))


def colors(image: Tensor, shares: int = 64) -> Tensor:
    """Distribution of the colours, wherever they are, (B, 8, shares): quantiles along eight directions.

    The squared difference of two of them is a sliced Wasserstein distance (Rabin et al. 2011).
    """
    directions = F.normalize(image.new_tensor(DIRECTIONS), dim=1)
    along = (directions @ image.flatten(2)).sort(dim=2).values
    return F.adaptive_avg_pool1d(along, shares)


def layout(image: Tensor, cells: int = 8) -> Tensor:
    """The image in cells x cells large pixels: where it is light or dark and of which colour, (B, 3, cells, cells).

    Cells overlap, so that guidance draws no grid.
    """
    return resize(image, (cells, cells))


def edges(image: Tensor, size: int = 64) -> Tensor:
    """Strength of the edges in each place (Sobel), (B, 1, size, size)."""
    small = resize(grey(image), (size, size))
    across = image.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None] / 2
    padded = F.pad(small, (1, 1, 1, 1), mode="replicate")
    return (F.conv2d(padded, across).square() + F.conv2d(padded, across.mT).square() + 1e-6).sqrt()


def left_right(image: Tensor) -> Tensor:
    """Difference between the image and its mirror image, each pair of pixels counted once, (B, 3, H, W)."""
    return (image - image.flip(3)) / 2**0.5


def top_bottom(image: Tensor) -> Tensor:
    """Difference between the image and itself upside down, each pair of pixels counted once, (B, 3, H, W)."""
    return (image - image.flip(2)) / 2**0.5


def half_turn(image: Tensor) -> Tensor:
    """Difference between the image and itself turned by 180 degrees, each pair of pixels counted once, (B, 3, H, W)."""
    return (image - image.flip((2, 3))) / 2**0.5


def seams(image: Tensor) -> Tensor:
    """Jump across the border of an image laid beside itself, less the slope inside, (B, n): 0 tiles without seams."""
    jumps = torch.cat([_seam(image), _seam(image.mT)], dim=1)
    return jumps * (jumps.shape[1] / image[0].numel()) ** 0.5  # each value at the border counts once


def _seam(image: Tensor) -> Tensor:
    step = image[..., :1] - image[..., -1:]
    slope = (image[..., 1:2] - image[..., :1] + image[..., -1:] - image[..., -2:-1]) / 2
    return (step - slope).flatten(1)


def roughness(image: Tensor) -> Tensor:
    """Square root of half the local gradient, (B, 3, H, W): its energy is a quarter of the total variation."""
    right, down = F.pad(image.diff(dim=3), (0, 1)), F.pad(image.diff(dim=2), (0, 0, 0, 1))
    return ((right.square() + down.square() + 1e-6).sqrt() / 2).sqrt()


class Rule(NamedTuple):
    """A measurement of images, and how it is aimed and shown."""

    read: Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> features (B, ...); a number is (B, 1)
    aim: Literal["image", "number", "itself"]  # the features of another image; a number; "itself": the target is zero
    asks: str  # in a few words, what it asks of an image; for a number, what its values mean
    preview: Callable[[Tensor, Tensor], Tensor] | None = None  # (images, features) -> pictures; None: as its task is shown


def _edge_preview(images: Tensor, strengths: Tensor) -> Tensor:
    return depth_picture(strengths)


RULES: dict[str, Rule] = {
    "colours": Rule(colors, "image", "the same colours in the same shares, wherever they are", color_stripes),
    "layout": Rule(layout, "image", "light, dark and colour in the same places", enlarged),
    "edges": Rule(edges, "image", "outlines in the same places", _edge_preview),
    "brightness": Rule(brightness, "number", "0 is black, 1 is white"),
    "contrast": Rule(contrast, "number", "0 is flat, 0.5 is half black and half white"),
    "saturation": Rule(saturation, "number", "0 is grey"),
    "sharpness": Rule(sharpness, "number", "0 is blurred, photographs have 0.05 to 0.1"),
    "symmetry left-right": Rule(left_right, "itself", "the image equals its mirror image"),
    "symmetry top-bottom": Rule(top_bottom, "itself", "the image equals itself upside down"),
    "symmetry half turn": Rule(half_turn, "itself", "the image equals itself turned by 180 degrees"),
    "seamless tiling": Rule(seams, "itself", "the image continues across its border when laid beside itself"),
    "smoothness": Rule(roughness, "itself", "less texture"),
}
"""Name of a rule, as saved workflows have it -> the rule."""


class RuleNet(nn.Module):
    """A rule as net(image, sigma)."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule = rule

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        features = self.rule.read(image)
        return features[:, None] if features.ndim == 1 else features


def rule_guider(name: str) -> Guider:
    """The guider of a rule, a key of RULES. ValueError for another name."""
    if name not in RULES:
        raise ValueError(f"there is no rule '{name}': expected one of {', '.join(RULES)}")
    rule = RULES[name]
    guider = Guider(f"rule/{name}", RuleNet(rule), Preprocess((1, 1), fit="own"),
                    "number" if rule.aim == "number" else "features")
    return guider.aim(torch.zeros(1, 1)) if rule.aim == "itself" else guider
