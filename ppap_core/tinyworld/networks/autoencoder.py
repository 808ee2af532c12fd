"""The autoencoder of the latent tiny world, in the layout of TAESD: ComfyUI's own VAE loader reads its file."""
import torch
from torch import Tensor, nn

WIDTH = 64     # channels of the layers
CHANNELS = 16  # of a latent
SHRINK = 8     # pixels along one side of a latent's place


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class Bounded(nn.Module):
    """Limits the input of a decoder to [-3, 3], smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class Block(nn.Module):
    """Three convolutions around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()


def _shrink() -> list[nn.Module]:
    return [_conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block()]


def _grow(blocks: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False), *(Block() for _ in range(blocks))]


class TinyAutoencoder(nn.Module):
    """image (B, 3, 8h, 8w) in [-1, 1] <-> unscaled latent (B, 16, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder = nn.Sequential(_conv(3, WIDTH), Block(), *_shrink(), *_shrink(), *_shrink(),
                                           _conv(WIDTH, CHANNELS))
        self.taesd_decoder = nn.Sequential(Bounded(), _conv(CHANNELS, WIDTH), nn.ReLU(), Block(), Block(), Block(),
                                           *_grow(3), *_grow(3), *_grow(1), _conv(WIDTH, 3))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def encode(self, image: Tensor) -> Tensor:
        """Unscaled latent (B, 16, h, w) of an image (B, 3, 8h, 8w) in [-1, 1]."""
        return self.taesd_encoder((image + 1) / 2)

    def decode(self, latent: Tensor) -> Tensor:
        """Image (B, 3, 8h, 8w), about in [-1, 1], of an unscaled latent (B, 16, h, w)."""
        return self.taesd_decoder(latent) * 2 - 1
