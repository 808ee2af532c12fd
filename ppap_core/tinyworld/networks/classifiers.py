"""Tiny networks that guide: for class, depth and segmentation."""
from collections.abc import Sequence

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


class TinyNetwork(nn.Module):
    """Three levels of features and a head: one output for each image, or one for each pixel.

    image (B, 3, H, W) with H and W divisible by 8 -> (B, outputs), or (B, outputs, H, W) when dense
    """

    def __init__(self, levels: Sequence[nn.Module], widths: tuple[int, int, int], outputs: int, dense: bool):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.dense = dense
        if dense:
            self.lateral = nn.ModuleList(nn.Conv2d(width, widths[0], 1) for width in widths)
            self.smooth = nn.Conv2d(widths[0], widths[0], 3, padding=1)
            self.head: nn.Module = nn.Conv2d(widths[0], 4 * outputs, 1)
        else:
            self.head = nn.Linear(widths[2], outputs)

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Feature maps at 1/2, 1/4 and 1/8 of the size of images (B, 3, H, W)."""
        features = []
        for level in self.levels:
            image = level(image)
            features.append(image)
        return features

    def features(self, image: Tensor) -> Tensor:
        """One feature vector (B, d) for each image, such as for Fréchet distances."""
        return self.pyramid(image)[-1].mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:
        if not self.dense:
            return self.head(self.features(image))
        pyramid = [lateral(level) for lateral, level in zip(self.lateral, self.pyramid(image), strict=True)]
        h = pyramid[2]
        for finer in (pyramid[1], pyramid[0]):
            h = finer + F.interpolate(h, finer.shape[-2:], mode="bilinear")
        return F.pixel_shuffle(self.head(F.relu(self.smooth(h))), 2)


class TinyFeatures(nn.Module):
    """A tiny network up to the vector of features of an image: (B, 3, H, W) -> (B, d)."""

    def __init__(self, net: TinyNetwork):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net.features(image)


def tiny_resnet(outputs: int, dense: bool = False) -> TinyNetwork:
    """Plain residual convolutions, the guiders' architecture: `outputs` numbers for each image, or for each pixel."""
    a, b, c = widths = (32, 64, 128)
    levels = [nn.Sequential(nn.Conv2d(3, a, 3, 2, 1), ResidualBlock(a, a), ResidualBlock(a, a)),
              nn.Sequential(ResidualBlock(a, b, 2), ResidualBlock(b, b)),
              nn.Sequential(ResidualBlock(b, c, 2), ResidualBlock(c, c))]
    return TinyNetwork(levels, widths, outputs, dense)
