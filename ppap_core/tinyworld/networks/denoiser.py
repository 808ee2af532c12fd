"""The denoiser of the tiny worlds: a U-Net small enough for a CPU, for pixels or latents, conditional or not."""
import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...noise import PIXEL_SIGMA_DATA


def noise_features(c_noise: Tensor, width: int) -> Tensor:
    """Fourier features of scaled noise levels, (B,) -> (B, width)."""
    frequencies = torch.exp(torch.linspace(0, math.log(64), width // 2, device=c_noise.device))
    angle = c_noise[:, None].float() * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def zero_init(layer: nn.Module) -> None:
    """Set all parameters of a layer to zero: its block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Block(nn.Module):
    """Residual block: two 3x3 convolutions; the embedded noise level scales and shifts the second norm."""

    def __init__(self, inputs: int, outputs: int, embedding: int, attention: bool = False):
        super().__init__()
        self.norm_1 = nn.GroupNorm(8, inputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.norm_2 = nn.GroupNorm(8, outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attention else nn.Identity()
        zero_init(self.conv_2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_2(F.silu(self.norm_2(h) * (1 + scale) + shift))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        zero_init(self.out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three n c) h w -> three b n (h w) c", three=3, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b n (h w) c -> b (n c) h w", h=x.shape[2]))


class TinyUNet(nn.Module):
    """U-Net on 2x2 pixel patches with two levels.

    x (B, channels, H, W) with H and W divisible by 4, c_noise (B,), condition (B, conditions) if there are any -> like x
    """

    def __init__(self, width: int = 64, blocks: int = 3, channels: int = 3, conditions: int = 0):
        super().__init__()
        embedding, wide = 4 * width, 2 * width
        self.embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.condition = nn.Linear(conditions, embedding) if conditions else None
        self.width = width
        self.stem = nn.Conv2d(4 * channels, width, 3, padding=1)
        self.down = nn.ModuleList(Block(width, width, embedding) for _ in range(blocks))
        self.pool = nn.Conv2d(width, wide, 2, stride=2)
        self.middle = nn.ModuleList(Block(wide, wide, embedding, attention=i % 2 == 0) for i in range(2 * blocks))
        self.grow = nn.Conv2d(wide, 4 * width, 1)
        self.up = nn.ModuleList(Block(2 * width, width, embedding) for _ in range(blocks))
        self.norm = nn.GroupNorm(8, width)
        self.head = nn.Conv2d(width, 4 * channels, 3, padding=1)
        zero_init(self.head)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        embedding = self.embedding(x, c_noise, condition)
        h, skips = self.encode(x, embedding)
        h = F.pixel_shuffle(self.grow(h), 2)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)

    def embedding(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """The embedded noise level and condition, (B, 4 width)."""
        embedding = self.embed(noise_features(c_noise, self.width).to(x.dtype))
        return embedding if self.condition is None else embedding + self.condition(condition)

    def encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features of the lower level (B, 2 width, H/4, W/4) and of each block of the upper, (B, width, H/2, W/2)."""
        h = self.stem(F.pixel_unshuffle(x, 2))
        skips = []
        for block in self.down:
            h = block(h, embedding)
            skips.append(h)
        h = self.pool(h)
        for block in self.middle:
            h = block(h, embedding)
        return h, skips


class TinyDenoiser(nn.Module):
    """The U-Net with EDM preconditioning (Karras et al. 2022, table 1): a Denoiser.

    x = image + sigma * noise (B, channels, H, W), sigma (B,), condition (B, conditions) if there are any -> expected image,
    like x. The arguments are those of `TinyUNet`.
    """

    def __init__(self, width: int = 64, blocks: int = 3, channels: int = 3, conditions: int = 0):
        super().__init__()
        self.net = TinyUNet(width, blocks, channels, conditions)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        s = sigma.to(torch.float32)[:, None, None, None]
        total = (s**2 + PIXEL_SIGMA_DATA**2).sqrt()
        out = self.net((x / total).to(x.dtype), sigma.log() / 4, condition)
        return PIXEL_SIGMA_DATA**2 / total**2 * x + s * PIXEL_SIGMA_DATA / total * out

    def encode(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Inner features of noisy states without a condition: of the lower level, and of the last block before it."""
        total = (sigma.to(torch.float32)[:, None, None, None] ** 2 + PIXEL_SIGMA_DATA**2).sqrt()
        scaled = (x / total).to(x.dtype)
        coarse, fine = self.net.encode(scaled, self.net.embedding(scaled, sigma.log() / 4))
        return coarse, fine[-1]
