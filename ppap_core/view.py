"""What a guider sees of what is diffused: of a latent, an image is made, cheaply enough for every step."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 32  # features of a stem
GROW = 4    # its pixels along one side of a latent's place


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """A kind of latents: all models that diffuse it share experts.

    factors (C, 3), bias (3,): what each channel adds to red, green and blue in [-1, 1], about.
    shuffle: pixels along one side that a place of the latent holds among its channels before the factors meet them.
    """

    name: str
    factors: Tensor
    bias: Tensor
    shuffle: int = 1

    @property
    def channels(self) -> int:
        return len(self.factors) * self.shuffle**2

    def colours(self, latent: Tensor) -> Tensor:
        """The image that the colours alone tell, (B, channels, h, w) -> (B, 3, h * shuffle, w * shuffle)."""
        return to_colours(F.pixel_shuffle(latent, self.shuffle), self.factors, self.bias)


def to_colours(latent: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 3, h, w)"""
    return torch.einsum("bchw, cd -> bdhw", latent, factors.to(latent)) + bias.to(latent)[:, None, None]


class Stem(nn.Module):
    """A small convolutional decoder that starts as the colours of the latent and is trained together with an expert.

    latent (B, channels, h, w) -> image (B, 3, GROW h, GROW w), times the shuffle of the space
    """

    def __init__(self, space: LatentSpace, generator: torch.Generator):
        super().__init__()
        self.space = space
        channels = len(space.factors)
        self.body = nn.Sequential(nn.Conv2d(channels, WIDTH, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(WIDTH, 3 * GROW**2, 3, padding=1))
        for layer in self.body[:4:2]:
            nn.init.kaiming_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.body[4].weight)
        nn.init.zeros_(self.body[4].bias)

    def forward(self, latent: Tensor) -> Tensor:
        latent = F.pixel_shuffle(latent, self.space.shuffle)
        plain = to_colours(latent, self.space.factors, self.space.bias)
        plain = F.interpolate(plain, scale_factor=GROW, mode="bilinear", align_corners=False)
        return plain + F.pixel_shuffle(self.body(latent), GROW)
