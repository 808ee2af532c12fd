"""Frames of videos: which of them become samples, and how a VAE shows each of them to a guider."""
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ...ppap_core.rng import seeded

MOST_FRAMES = 4  # of a generated video that experts learn from; they are alike, and files hold whole videos


def frames_to_keep(count: int) -> int:
    """Return how many of a video's frames become samples: a power of two, so that files of samples hold whole videos."""
    return 2 ** (min(count, MOST_FRAMES).bit_length() - 1)


def choose_frames(seeds: Sequence[int], count: int, kept: int) -> Tensor:
    """Return which frames of each video become samples, (B, kept) in order. seeds: one for each video; count: its frames."""
    return torch.stack([torch.randperm(count, generator=seeded(seed, 5))[:kept].sort().values for seed in seeds])


def take_frames(x: Tensor, chosen: Tensor) -> Tensor:
    """Return chosen frames (B, K) of videos (B, C, T, h, w) as images (B K, C, h, w); images stay as they are."""
    if x.ndim == 4:
        return x
    return x.movedim(2, 1)[torch.arange(len(x))[:, None], chosen].flatten(0, 1)


def shown_at(frame: Tensor, count: int, shown: int) -> Tensor:
    """Return which of a decoded video's `shown` images stands for a frame of its latent, which has `count` of them.

    The first frame of a latent is one image, and each later one a group of them, of which the middle one is taken.
    """
    group = (shown - 1) // (count - 1) if (shown - 1) % (count - 1) == 0 else shown // count
    return (frame * group - group // 2).clamp(0, shown - 1)


class FrameDecoder(torch.nn.Module):
    """A VAE of videos that shows each frame as one image: it decodes the frame behind the one before it.

    decoder: its `decode` makes videos (B, 3, T, H, W) of latents of two frames (B, C, 2, h, w). Gradients pass to the frame
    itself alone.
    """

    previous: Tensor | None = None  # the frame before each, (B, C, h, w); None: each frame stands behind itself
    is_first: Tensor | None = None  # whether a frame is the first of its video, (B,)

    def __init__(self, decoder: Any):
        super().__init__()
        self.decoder = decoder

    def watch(self, frames: Tensor, count: int) -> None:
        """Note the frames of whole videos, (B count, C, h, w), among which those that are decoded next will be."""
        with torch.inference_mode(False):
            place = torch.arange(len(frames), device=frames.device)
            self.is_first = place % count == 0
            self.previous = frames.detach()[place - (~self.is_first).long()].clone()

    def sliced(self, part: slice) -> "FrameDecoder":
        """Return the decoder for a part of what it watches."""
        if self.previous is None or self.is_first is None:
            return self
        decoder = copy(self)
        decoder.previous, decoder.is_first = self.previous[part], self.is_first[part]
        return decoder

    def forward(self, latent: Tensor, sigma: Tensor) -> Tensor:
        previous = latent.detach() if self.previous is None else self.previous.to(latent)
        images = self.decoder.decode(torch.stack([previous, latent], dim=2))
        place = torch.ones(len(latent), dtype=torch.long, device=latent.device)
        if self.is_first is not None:
            place = place - self.is_first.long()
        return images.movedim(2, 1)[torch.arange(len(latent), device=latent.device), shown_at(place, 2, images.shape[2])]
