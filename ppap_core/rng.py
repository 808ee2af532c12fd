"""Randomness that depends on seeds alone: equal on every machine, whatever ran before."""
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seeded(*parts: int) -> torch.Generator:
    """Generator on the CPU, seeded by all of these integers, which may have any size."""
    value = hashlib.sha256(repr(tuple(int(part) for part in parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8], "little"))


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(seeds), *shape); row i depends on seeds[i] only, so that batches can be split anywhere."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed) % 2**64)) for seed in seeds])


def noise_like(x: Tensor, seeds: Sequence[int], *key: int) -> Tensor:
    """Noise like x (B, C, H, W) from generators seeded with each image's seed and the key."""
    return torch.stack([torch.randn(x.shape[1:], generator=seeded(seed, *key)) for seed in seeds]).to(x)
