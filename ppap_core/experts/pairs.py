"""What experts learn from, a batch at a time: steps of a store in the interval of an expert, with the images they led to."""
from typing import NamedTuple

import torch
from torch import Tensor

from ..rng import seeded
from ..schedules import ExpertSchedule
from .samples import BatchSpec, SampleStore


class Pairs(NamedTuple):
    """A batch for one expert: inputs for the student, and the images they led to, for the teacher."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    inputs: Tensor  # (B, C, h, w)
    sigma: Tensor   # (B,), all in the interval of the expert

    def to(self, device: torch.device | str) -> "Pairs":
        """Copy to a device."""
        return Pairs(*(part.to(device) for part in self))


def trajectory_pairs(store: SampleStore, schedule: ExpertSchedule, index: int, batch: BatchSpec, view: str) -> Pairs:
    """Random steps in the interval of expert `index`, with the images they led to: a pure function of the arguments.

    view: "noisy" or "denoised". ValueError if the store has no step in the interval.
    """
    return pairs_at(store, draw_steps(store, schedule, index, batch), view)


def draw_steps(store: SampleStore, schedule: ExpertSchedule, index: int, batch: BatchSpec) -> Tensor:
    """Random (image, step) in the interval of expert `index`, (size, 2) long, as for `trajectory_pairs`."""
    steps = steps_in(store, schedule, index)
    if len(steps) == 0:
        raise ValueError(f"no step of the images lies between sigma {schedule[index].lo:.4g} and {schedule[index].hi:.4g}, "
                         f"where expert {index} is to learn: generate samples with more steps, or use fewer experts")
    chosen = torch.randint(len(steps), (batch.size,), generator=seeded(batch.seed, index, batch.step))
    first, parts = batch.part
    return steps[chosen[first::parts]]


def steps_in(store: SampleStore, schedule: ExpertSchedule, index: int) -> Tensor:
    """(image, step) of every kept step in the interval of expert `index`, (n, 2) long."""
    return store.shards.cached((schedule.edges, index), _find_steps, store.sigmas, schedule, index)


def _find_steps(sigmas: Tensor, schedule: ExpertSchedule, index: int) -> Tensor:
    inner = torch.tensor(schedule.edges[1:-1], dtype=torch.float64)
    return (torch.bucketize(sigmas.double(), inner, right=True) == index).nonzero()


def pairs_at(store: SampleStore, steps: Tensor, view: str) -> Pairs:
    """The pairs of some (image, step) of a store, (n, 2) long. view: "noisy" or "denoised"."""
    return Pairs(store.images_at(steps[:, 0]), *inputs_at(store, steps, view))


def inputs_at(store: SampleStore, steps: Tensor, view: str) -> tuple[Tensor, Tensor]:
    """Inputs of experts (n, C, h, w) at some (image, step), (n, 2) long, and their noise levels (n,)."""
    image, step = steps.T
    inputs = store.shards.read("noisy" if view == "noisy" else "denoised", image, step)
    return inputs.float(), store.sigmas[image, step]
