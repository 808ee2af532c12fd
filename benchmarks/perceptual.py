"""How near images are to true ones: by pixels and by the features of a network."""
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .real import real_networks

SEEN = 128                 # pixels at which SqueezeNet compares images
COMPARED = (1, 5, 10, 12)  # its layers whose features are compared: before each pooling, and the last


@torch.no_grad()
def compare(images: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB and perceptual distance of images (B, 1, H, W) in [-1, 1] from the true ones, (2, B)."""
    error = (images.clamp(-1, 1) - truth).square().flatten(1).mean(1)
    return torch.stack([10 * torch.log10(4 / error), perceptual_distance(images.clamp(-1, 1), truth)])


def perceptual_distance(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of SqueezeNet's features, (B,), the channels of each place at length 1 (Zhang et al. 2018).

    Layers count alike: no weights were learnt.
    """
    return torch.stack([(F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean((1, 2))
                        for one, other in zip(_features(images), _features(others), strict=True)]).mean(0)


def _features(images: Tensor) -> list[Tensor]:
    real = real_networks()
    values, kept = real.bytes_minus(real.resize(images.expand(-1, 3, -1, -1), SEEN), 123, 117, 104), []
    for index, layer in enumerate(_squeezenet()):
        values = layer(values)
        if index in COMPARED:
            kept.append(values)
    return kept


@cache
def _squeezenet() -> nn.Sequential:
    return real_networks().squeezenet().features
