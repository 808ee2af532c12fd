"""Randomness that depends on numbers alone: the same on every machine, whatever ran before."""
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seeded(*parts: int) -> torch.Generator:
    """A generator that depends on all of these numbers, of any size."""
    value = hashlib.sha256(repr(tuple(int(part) for part in parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8], "little"))


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(len(seeds), *shape); row i depends on seeds[i] only, so batches can be cut anywhere."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed) % 2**64)) for seed in seeds])
