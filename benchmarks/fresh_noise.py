"""The paper's training pairs: finished images under noise that is drawn anew, to be compared with trajectories."""
from collections.abc import Callable

import torch
from torch import Tensor

from ppap_core.experts.pairs import Pairs
from ppap_core.experts.samples import BatchSpec, SampleStore
from ppap_core.noise import expand
from ppap_core.rng import seeded
from ppap_core.schedules import ExpertSchedule


def fresh_pairs(store: SampleStore, schedule: ExpertSchedule, index: int, batch: BatchSpec,
                view: Callable[[Tensor, Tensor], Tensor], device: torch.device | str = "cpu") -> Pairs:
    """Random images, half of them mirrored, under fresh noise of the interval of expert `index`.

    view: (noisy state, sigma) -> inputs of the expert, on the device: `to_vp` or a denoiser.
    ValueError for the images of a model of latents, which fresh noise does not fit.
    """
    diffused, image = tuple(store.shards.row("noisy").shape[1:]), tuple(store.shards.row("images").shape)
    if diffused != image:
        raise ValueError(f"what was diffused has the shape {diffused} and its images {image}: fresh noise is for "
                         "models of pixels, take the trajectories")
    generator = seeded(batch.seed, index, batch.step)
    images = store.random_images(BatchSpec(batch.step, batch.size, batch.seed + index * 2**64))
    images = torch.where(torch.rand(batch.size, 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
    sigma = schedule[index].sample(batch.size, generator)
    noise = torch.randn(images.shape, generator=generator)
    images, sigma, noise = (part.to(device) for part in (images, sigma, noise))
    with torch.no_grad():
        return Pairs(images, view(images + expand(sigma, images) * noise, sigma), sigma)
