"""Quick looks at what experts have learned: how often, or how nearly, they give the plain network's answer."""
from typing import NamedTuple

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from ..schedules import ExpertSchedule
from .bank import ExpertBank, with_experts
from .examine import BATCH, LEARNED_FROM, plain_judge
from .pairs import Pairs, pairs_at, steps_in, trajectory_pairs
from .samples import BatchSpec, SampleStore
from .teacher import answer, soften

STEPS = 128  # of the held-out ones, at most: evenly chosen


class Checked(NamedTuple):
    """What one look says; both are 0 where there are no steps, so that nothing rises or falls.

    The distance is what training makes small. Where images are learned by heart it grows, and agreement hardly tells.
    """

    agreement: float  # mean, in [0, 1]
    distance: float   # mean


class HeldOutCheck:
    """Compares one expert with the plain network's answers on finished images, at steps that it does not learn from.

    Where a store holds no images apart, it is measured on the first that the expert learns from. The answers are computed
    once. guider: the plain one. temperature: divides the answers for the distance, as in training; neutral: 1.
    """

    def __init__(self, guider: Guider, bank: ExpertBank, index: int, store: SampleStore, temperature: float = 1.0):
        held_out = store.held_out
        self.guider, self.bank, self.store = guider, bank, held_out or store  # has images
        self.temperature = temperature
        steps = steps_in(self.store, bank.schedule, index)
        steps = steps if held_out else steps[steps[:, 0] < LEARNED_FROM]
        self.parts = steps[torch.linspace(0, len(steps) - 1, min(STEPS, len(steps))).long()].split(BATCH)
        self.teacher: list[Tensor] = []
        self._plain: Checked | None = None

    def __call__(self) -> Checked:
        """What the expert gives as it is now."""
        return self._compare(with_experts(self.guider, self.bank))

    def plain(self) -> Checked:
        """What the plain network gives on the same inputs."""
        if self._plain is None:
            self._plain = self._compare(plain_judge(self.guider, self.bank))
        return self._plain

    @torch.no_grad()
    def _compare(self, judge: Guider) -> Checked:
        task, device = TASKS[self.guider.task], next(self.bank.parameters()).device
        agreements, distances = [torch.zeros(0)], [torch.zeros(0)]
        for number, part in enumerate(self.parts):
            pairs = pairs_at(self.store, part, self.bank.view).to(device)
            if number == len(self.teacher):
                self.teacher.append(answer(self.guider, pairs.images).cpu())
            output = judge.predict(judge.to_image(pairs.inputs, pairs.sigma), pairs.sigma)
            teacher = self.teacher[number].to(device)
            agreements.append(task.agreement(output, teacher).cpu())
            distances.append(task.distance(output, soften(self.guider, teacher, self.temperature)).cpu())
        return Checked(*(float(torch.cat(part).mean().nan_to_num()) for part in (agreements, distances)))


@torch.no_grad()
def teacher_distance(guider: Guider, other: Guider, store: SampleStore, schedule: ExpertSchedule, size: int = 64,
                     device: torch.device | str = "cpu") -> list[tuple[float, float]]:
    """(mean noise level, mean distance) for each interval: how far `other`, on steps of the store, is from the teacher.

    With the plain guider as `other` it shows where experts are needed; with the experts, what they learned.
    guider: the plain one, the teacher, on the images that the steps led to. size: steps measured in each interval.
    device: of the networks.
    """
    return [_distance(guider, other, trajectory_pairs(store, schedule, index, BatchSpec(0, size, -1), other.view).to(device))
            for index in range(len(schedule))]


def _distance(guider: Guider, other: Guider, pairs: Pairs) -> tuple[float, float]:
    teacher, distances = guider.predict(pairs.images, clean(pairs.images)), []
    for level in pairs.sigma.unique():  # level by level, because a bank takes one of its intervals at a time
        rows = pairs.sigma == level
        image = other.to_image(pairs.inputs[rows], pairs.sigma[rows])
        distances.append(TASKS[guider.task].distance(other.predict(image, pairs.sigma[rows]), teacher[rows]))
    return float(pairs.sigma.log().mean().exp()), float(torch.cat(distances).mean())
