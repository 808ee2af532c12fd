"""Steps on the way to generated images, as a model is asked for them while it is sampled."""
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import to_vp
from ..rng import seeded
from ..sampling import Denoiser

STEPS_PER_TRAJECTORY = 6  # steps kept of each trajectory


class Trajectories(NamedTuple):
    """K steps on the way to each of B images."""

    sigmas: Tensor    # (B, K) noise levels
    noisy_vp: Tensor  # (B, K, C, h, w) noisy states in VP scaling: inputs of experts of the noisy view
    denoised: Tensor  # (B, K, C, h, w) predictions: inputs of experts of the denoised view


class TrajectoryRecorder:
    """Records the inputs and predictions of a model while it is sampled, with any sampler."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        """Record one call: the VE state (B, C, h, w), its noise level (B,), and the prediction (B, C, h, w)."""
        self.calls.append((sigma.cpu(), to_vp(x, sigma).half().cpu(), denoised.half().cpu()))

    def wrap(self, denoise: Denoiser) -> Denoiser:
        """A denoiser that returns what `denoise` does and records it."""
        return partial(self._call, denoise)

    def _call(self, denoise: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        self.record(x, sigma, denoised)
        return denoised

    def trajectories(self, seeds: Sequence[int], kept: int = STEPS_PER_TRAJECTORY) -> Trajectories:
        """Per image, one seeded step from each of `kept` equal segments of its trajectory; clears the recording.

        seeds: one for each image of the batch, (B,). ValueError if nothing was recorded.
        """
        calls, self.calls = self.calls, []
        if not calls:
            raise ValueError("the model was not asked once: choose at least one step")
        draws = torch.stack([torch.rand(kept, generator=seeded(seed, 3)) for seed in seeds])
        steps = ((torch.arange(kept) + draws) * len(calls) / kept).long().clamp_max(len(calls) - 1)  # (B, K)
        rows = torch.arange(len(seeds))[:, None]
        return Trajectories(*(torch.stack(part, 1)[rows, steps] for part in zip(*calls, strict=True)))
