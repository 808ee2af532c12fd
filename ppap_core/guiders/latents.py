"""Images of latents, cheap enough for every step, and the views of a noisy state that a guider can have."""
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

View = Literal["noisy", "denoised"]
"""Input of a guider: the noisy state on the variance-preserving scale, or the denoised prediction."""
VIEWS: tuple[View, ...] = get_args(View)

PIXELS = "pixel"  # the name of a space of images themselves

STEM_WIDTH = 32   # channels inside a stem
STEM_SCALE = 4    # pixels along one side of a latent's place in the image of a stem
STEM_LAST = "body.4"  # its last layer, which adds nothing to the colours while it is zero


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """A kind of latents with its linear colours; all models that diffuse it share experts.

    factors (C, 3), bias (3,): contribution of each channel to red, green and blue, approximately in [-1, 1].
    shuffle: pixels along one side that a place of the latent holds in its channels (a pixel shuffle comes first); 1: none.
    """

    name: str
    factors: Tensor
    bias: Tensor
    shuffle: int = 1

    def colors(self, latent: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Linear latent-to-RGB preview, (B, C shuffle^2, h, w) -> (B, 3, h shuffle, w shuffle); ignores sigma."""
        latent = F.pixel_shuffle(latent, self.shuffle)
        return torch.einsum("bchw, cd -> bdhw", latent, self.factors.to(latent)) + self.bias.to(latent)[:, None, None]


def stem_numbers(space: LatentSpace) -> int:
    """Number of weights of a stem."""
    channels = len(space.factors), STEM_WIDTH, STEM_WIDTH, 3 * STEM_SCALE**2
    return sum(9 * inputs * outputs + outputs for inputs, outputs in pairwise(channels))


class Stem(nn.Module):
    """A small convolutional decoder that starts as the linear colours and is trained together with an expert.

    latent (B, C shuffle^2, h, w) -> image (B, 3, H, W) with H = STEM_SCALE shuffle h and W = STEM_SCALE shuffle w
    """

    def __init__(self, space: LatentSpace, generator: torch.Generator):
        super().__init__()
        self.space = space
        convolutions = [nn.Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in (
            (len(space.factors), STEM_WIDTH), (STEM_WIDTH, STEM_WIDTH), (STEM_WIDTH, 3 * STEM_SCALE**2))]
        first, middle, last = convolutions
        self.body = nn.Sequential(first, nn.SiLU(), middle, nn.SiLU(), last)
        for name, parameter in self.body.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        for layer in (first, middle):
            nn.init.kaiming_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(last.weight)  # a new stem shows the linear colours alone

    def forward(self, latent: Tensor) -> Tensor:
        colors = F.interpolate(self.space.colors(latent), scale_factor=STEM_SCALE, mode="bilinear", align_corners=False)
        return colors + F.pixel_shuffle(self.body(F.pixel_shuffle(latent, self.space.shuffle)), STEM_SCALE)
