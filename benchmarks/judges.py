"""The architectures of the judges, which never guide, and the augmentation that all tiny networks are trained with."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppap_core.tinyworld.networks.classifiers import TinyNetwork


class MixerBlock(nn.Module):
    """ConvNeXt's block (Liu et al. 2022): depthwise 5x5, then a two-layer perceptron on each pixel."""

    def __init__(self, width: int):
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.reduce = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(F.gelu(self.expand(self.norm(self.spatial(x)))))


def tiny_convnext(outputs: int, dense: bool = False) -> TinyNetwork:
    """The judges' architecture: depthwise convolutions and pixel-wise perceptrons."""
    a, b, c = widths = (48, 80, 128)
    levels = [nn.Sequential(nn.Conv2d(3, a, 4, 2, 1), MixerBlock(a), MixerBlock(a)),
              nn.Sequential(nn.Conv2d(a, b, 2, 2), MixerBlock(b), MixerBlock(b)),
              nn.Sequential(nn.Conv2d(b, c, 2, 2), MixerBlock(c), MixerBlock(c))]
    return TinyNetwork(levels, widths, outputs, dense)


class TinyTransformer(nn.Module):
    """A vision transformer behind two convolutions (Xiao et al. 2021): the architecture of the held-out judges.

    image (B, 3, 32, 32) -> (B, outputs), or (B, outputs, 32, 32) when dense
    """

    def __init__(self, outputs: int, dense: bool = False, width: int = 96, depth: int = 5, grid: int = 8):
        super().__init__()
        self.dense = dense
        self.stem = nn.Sequential(nn.Conv2d(3, width // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(width // 2, width, 3, 2, 1))
        self.place = nn.Parameter(0.02 * torch.randn(1, grid**2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs * (16 if dense else 1))

    def forward(self, image: Tensor) -> Tensor:
        h = self.stem(image)
        tokens = self.encoder(h.flatten(2).transpose(1, 2) + self.place)
        if not self.dense:
            return self.head(tokens.mean(1))
        return F.pixel_shuffle(self.head(tokens).transpose(1, 2).unflatten(2, h.shape[2:]), 4)


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Training images (B, 3, H, W) in [-1, 1] with slight blur, noise up to 0.1, and other brightness and contrast."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).to(image).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    image = image.lerp(blurred.to(image), _uniform(image, 0, 1, generator))
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = (image - mean) * _uniform(image, 0.7, 1.2, generator) + mean + _uniform(image, -0.15, 0.15, generator)
    noise = torch.randn(image.shape, generator=generator).to(image)
    return image.clamp(-1, 1) + _uniform(image, 0, 0.1, generator) * noise


def _uniform(image: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(len(image), 1, 1, 1).uniform_(low, high, generator=generator).to(image)
