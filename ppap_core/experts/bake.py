"""Bake what guidance does into a LoRA: a diffusion model learns to predict by itself what it predicts while it is guided.

Guidance distillation (Meng et al. 2023, arXiv 2210.03142), here of guidance by other networks too (Hsiao et al. 2024), from
the steps of guided samplings alone.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..noise import from_vp
from ..rng import seeded
from ..training.finetune import FineTune, denoising_loss, train_updates
from ..training.loop import RunOptions
from ..training.lora import LoraUpdate
from .samples import SampleStore

MEASURED = 64  # images on which to measure what was learned


class GuidedSteps(NamedTuple):
    """Steps of guided samplings: what the model was given, and what it predicted with guidance."""

    x: Tensor       # (B, C, h, w) VE states
    sigma: Tensor   # (B,) noise levels
    guided: Tensor  # (B, C, h, w) denoised predictions

    def to(self, device: torch.device) -> "GuidedSteps":
        """Copy to a device."""
        return GuidedSteps(*(part.to(device) for part in self))


class Student(NamedTuple):
    """A diffusion model that learns to do without guidance."""

    net: nn.Module                               # the network inside `predict`; its weights stay as they are
    predict: Callable[[Tensor, Tensor], Tensor]  # (VE state (B, C, h, w), noise level (B,)) -> denoised prediction
    sigma_data: float = 1.0                      # std of what is diffused
    device: torch.device = torch.device("cpu")   # where the network computes

    def loss(self, steps: GuidedSteps) -> Tensor:
        """`denoising_loss` of predicting what the guided model predicted."""
        steps = steps.to(self.device)
        return denoising_loss(self.predict(steps.x, steps.sigma), steps.guided, steps.sigma, self.sigma_data)


def bake(student: Student, store: SampleStore, config: FineTune,
         options: RunOptions = RunOptions()) -> tuple[dict[str, LoraUpdate], list[float]]:
    """Train low-rank updates of a model until it predicts without guidance what it predicted with it.

    store: images that the guided model generated. options: run_id is completed by the settings and the store's manifest and
    length; on_step gets the updates by layer. Returns the updates and the loss of every step.
    ValueError if the network has no layer that could be updated, and for an empty store.
    """
    def loss(step: int) -> Tensor:
        return student.loss(random_steps(store, config, step))

    options = options.identified({"config": dict(vars(config)), "samples": store.manifest, "count": len(store)})
    return train_updates(student.net, loss, config, student.device, "the baking", options)


def random_steps(store: SampleStore, config: FineTune, step: int) -> GuidedSteps:
    """Random steps of a store for a training step: a pure function of the arguments."""
    generator = seeded(config.seed, step, 2)
    image, kept = (torch.randint(count, (config.batch,), generator=generator) for count in store.sigmas.shape)
    return steps_at(store, image, kept)


def steps_at(store: SampleStore, image: Tensor, kept: Tensor) -> GuidedSteps:
    """Some steps of a store. image: (n,) long. kept: (n,) long, which of the kept steps of each."""
    sigma = store.sigmas[image, kept]
    x = from_vp(store.shards.read("noisy", image, kept).float(), sigma)
    return GuidedSteps(x, sigma, store.shards.read("denoised", image, kept).float())


class Learned(NamedTuple):
    """How much of what guidance does a LoRA does, measured on the same steps."""

    without: float  # error of the plain model in predicting what the guided one predicted
    baked: float    # that of the model with the LoRA

    @property
    def share(self) -> float:
        """Share of the error that is gone: 1 for all of it, 0 for nothing; below 0 if the LoRA made it worse.

        Not the share of the effect: what differs from image to image cannot be learned, and what is alike adds up.
        """
        return 1 - (self.baked / self.without) ** 0.5 if self.without else 1.0


def held_out_of(store: SampleStore) -> SampleStore:
    """Images to measure on: those that a store holds apart, or in small and old stores those to learn from."""
    held_out = store.held_out
    return held_out if held_out is not None and len(held_out) else store


@torch.no_grad()
def guided_error(student: Student, store: SampleStore, size: int) -> float:
    """Mean loss of a student on a step of each of a store's first images.

    size: of the batches.
    """
    images, kept = store.sigmas.shape
    parts = torch.arange(min(images, MEASURED)).split(size)
    losses = [len(image) * float(student.loss(steps_at(store, image, image % kept))) for image in parts]
    return sum(losses) / sum(map(len, parts))
