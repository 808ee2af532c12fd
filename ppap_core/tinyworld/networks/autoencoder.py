"""The autoencoder of the latent tiny world, in the layout of TAESD, so that the stock VAE loaders read its file."""
import torch
from torch import Tensor, nn

WIDTH, CHANNELS, SHRINK = 64, 16, 8
"""Features inside, channels of a latent, and pixels along one side of a latent's place."""


def _conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Bounded(nn.Module):
    """Keeps what a decoder reads within three, smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class Block(nn.Module):
    """Three convolutions around a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()


def _shrink() -> list[nn.Module]:
    return [_conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block()]


def _grow(blocks: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False), *(Block() for _ in range(blocks))]


class TinyAutoencoder(nn.Module):
    """image (B, 3, 8h, 8w) in [-1, 1] <-> latent (B, 16, h, w), as a VAE gives it, before a latent format's scale."""

    def __init__(self):
        super().__init__()
        self.taesd_encoder = nn.Sequential(_conv(3, WIDTH), Block(), *_shrink(), *_shrink(), *_shrink(),
                                           _conv(WIDTH, CHANNELS))
        self.taesd_decoder = nn.Sequential(Bounded(), _conv(CHANNELS, WIDTH), nn.ReLU(), Block(), Block(), Block(),
                                           *_grow(3), *_grow(3), *_grow(1), _conv(WIDTH, 3))
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def encode(self, image: Tensor) -> Tensor:
        return self.taesd_encoder((image + 1) / 2)

    def decode(self, latent: Tensor) -> Tensor:
        return self.taesd_decoder(latent) * 2 - 1
