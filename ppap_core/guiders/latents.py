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

    def colours(self, latent: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The image that the colours alone tell, whatever the noise: (B, C shuffle^2, h, w) -> (B, 3, h shuffle, w shuffle).

        What a guider without a stem or a decoder sees.
        """
        latent = F.pixel_shuffle(latent, self.shuffle)
        return torch.einsum("bchw, cd -> bdhw", latent, self.factors.to(latent)) + self.bias.to(latent)[:, None, None]


class Stem(nn.Module):
    """A small convolutional decoder that starts as the colours of the latent and is trained together with an expert.

    latent (B, C shuffle^2, h, w) -> image (B, 3, GROW h, GROW w), times the shuffle of the space
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
        plain = F.interpolate(self.space.colours(latent), scale_factor=GROW, mode="bilinear", align_corners=False)
        return plain + F.pixel_shuffle(self.body(F.pixel_shuffle(latent, self.space.shuffle)), GROW)


PIXELS = "pixel"  # the name of what is diffused where that is images
