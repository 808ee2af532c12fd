"""Guiders of the benchmark that learn from the exact labels of fresh noisy scenes."""
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ppap_core import Guider
from ppap_core.noise import expand
from ppap_core.rng import seeded
from ppap_core.tinyworld.scenes import draw, truth

from .losses import LOSSES
from .training import IntervalTraining, Networks, Run, viewed

LABELLED = 500_000_000  # scenes from this number on are for training with labels


@dataclass(frozen=True)
class LabelledExperts(IntervalTraining):
    """Experts trained with the exact labels of fresh noisy scenes."""

    marks: ClassVar[dict[str, Any]] = {"labels": True}

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        world, generator = run.world, seeded(LABELLED, index, step)
        first = LABELLED + (index * self.steps + step) * self.batch
        scenes = draw(range(first, first + self.batch))
        sigma = self.schedule[index].sample(self.batch, generator)
        noisy = scenes.image + expand(sigma, scenes.image) * torch.randn(scenes.image.shape, generator=generator)
        noisy, sigma = noisy.to(world.device), sigma.to(world.device)
        output = replace(world.guider, net=run.net).predict(viewed(world, self.view, noisy, sigma), sigma)
        return LOSSES[world.guider.task](output, truth(scenes, world.guider.task).to(world.device))


@dataclass(frozen=True)
class LabelledNetworks(LabelledExperts):
    """One whole network for each interval, trained with exact labels: the upper reference."""

    marks: ClassVar[dict[str, Any]] = {"labels": True, "whole": True}

    def network(self, base: nn.Module) -> "Networks":
        return Networks(base, self.schedule)

    def guider(self, run: Run) -> Guider:
        return replace(run.world.guider, net=run.net, view=self.view)
