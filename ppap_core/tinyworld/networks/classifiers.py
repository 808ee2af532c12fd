"""Tiny networks for class, depth and segmentation, in three architectures: one guides, the others judge."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; stride 2 halves the grid."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_1 = nn.GroupNorm(8, outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(8, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.shortcut(x) + self.norm_2(self.conv_2(h)))


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


class TinyNetwork(nn.Module):
    """Three levels of features and a head: one answer for each image, or one for each pixel.

    image (B, 3, H, W) with H and W divisible by 8 -> (B, outputs), or (B, outputs, H, W) when dense
    """

    def __init__(self, levels: list[nn.Module], widths: tuple[int, int, int], outputs: int, dense: bool):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.dense = dense
        if dense:
            self.lateral = nn.ModuleList(nn.Conv2d(width, widths[0], 1) for width in widths)
            self.smooth = nn.Conv2d(widths[0], widths[0], 3, padding=1)
            self.head = nn.Conv2d(widths[0], 4 * outputs, 1)
        else:
            self.head = nn.Linear(widths[2], outputs)

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Features at a half, a quarter and an eighth of the size."""
        features = []
        for level in self.levels:
            image = level(image)
            features.append(image)
        return features

    def features(self, image: Tensor) -> Tensor:
        """The image as one vector (B, d), for Frechet distances."""
        return self.pyramid(image)[-1].mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:
        if not self.dense:
            return self.head(self.features(image))
        pyramid = [lateral(level) for lateral, level in zip(self.lateral, self.pyramid(image), strict=True)]
        h = pyramid[2]
        for finer in (pyramid[1], pyramid[0]):
            h = finer + F.interpolate(h, finer.shape[-2:], mode="bilinear")
        return F.pixel_shuffle(self.head(F.relu(self.smooth(h))), 2)


def tiny_resnet(outputs: int, dense: bool = False) -> TinyNetwork:
    """The guiders' architecture: plain residual convolutions."""
    a, b, c = widths = (32, 64, 128)
    levels = [nn.Sequential(nn.Conv2d(3, a, 3, 2, 1), ResidualBlock(a, a), ResidualBlock(a, a)),
              nn.Sequential(ResidualBlock(a, b, 2), ResidualBlock(b, b)),
              nn.Sequential(ResidualBlock(b, c, 2), ResidualBlock(c, c))]
    return TinyNetwork(levels, widths, outputs, dense)


def tiny_convnext(outputs: int, dense: bool = False) -> TinyNetwork:
    """The judges' architecture: depthwise convolutions and pixel-wise perceptrons."""
    a, b, c = widths = (48, 80, 128)
    levels = [nn.Sequential(nn.Conv2d(3, a, 4, 2, 1), MixerBlock(a), MixerBlock(a)),
              nn.Sequential(nn.Conv2d(a, b, 2, 2), MixerBlock(b), MixerBlock(b)),
              nn.Sequential(nn.Conv2d(b, c, 2, 2), MixerBlock(c), MixerBlock(c))]
    return TinyNetwork(levels, widths, outputs, dense)


class TinyTransformer(nn.Module):
    """A vision transformer behind two convolutions (Xiao et al. 2021): the second judges' architecture.

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
    """What real networks see in training: slight blur, noise up to 0.1, brightness and contrast, (B, 3, H, W) in [-1, 1]."""
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(image), 1, 1, 1).uniform_(low, high, generator=generator).to(image)

    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).to(image).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    image = image.lerp(blurred.to(image), uniform(0, 1))
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = (image - mean) * uniform(0.7, 1.2) + mean + uniform(-0.15, 0.15)
    noise = torch.randn(image.shape, generator=generator).to(image)
    return image.clamp(-1, 1) + uniform(0, 0.1) * noise
