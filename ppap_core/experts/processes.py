"""Several processes that distill one bank: experts are spread over them, and those that are left over share an expert.

They are started by `accelerate launch` or `torchrun`, whose variables of the environment say how many there are.
"""
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from ..training.team import Team
from .bank import ExpertBank

PATIENCE = timedelta(days=7)  # to wait for a process whose expert takes longer


class Assignment(NamedTuple):
    """An expert and the processes that train it."""

    expert: int
    ranks: tuple[int, ...]


def assign(experts: int, processes: int, batch: int, in_order: bool = False) -> list[Assignment]:
    """Who trains which expert: each process one of its own in turn; those to whom none is left share the last ones.

    batch: images of a training step, of which each process that shares one takes a part. in_order: whether an expert begins
    as the one before it ended, so that all processes share each.
    """
    at_once, assignments = 1 if in_order else processes, []
    for first in range(0, experts, at_once):
        count = min(at_once, experts - first)
        assignments += [Assignment(first + place, tuple(range(place, processes, count))[:batch]) for place in range(count)]
    return assignments


@dataclass(frozen=True)
class Crew:
    """All processes that distill one bank. Neutral: the defaults, a single one."""

    size: int = 1
    rank: int = 0  # of this one

    def teams(self, assignments: Sequence[Assignment]) -> Iterator[tuple[int, Team]]:
        """Yield the experts that this process trains, with those that share them."""
        teams = [self._team(ranks) for _, ranks in assignments]  # every process has to make all groups
        for (expert, ranks), team in zip(assignments, teams, strict=True):
            if self.rank in ranks:
                yield expert, team

    def _team(self, ranks: tuple[int, ...]) -> Team:
        group = dist.new_group(list(ranks), timeout=PATIENCE) if len(ranks) > 1 else None
        return Team(group, ranks.index(self.rank) if self.rank in ranks else 0, len(ranks))

    def wait(self) -> None:
        """Wait until all processes have come this far."""
        if self.size > 1:
            dist.barrier()

    def exchange(self, bank: ExpertBank, losses: dict[int, list[float]], assignments: Sequence[Assignment]) -> None:
        """Copy the experts and the losses of other processes into this one's."""
        for expert, ranks in assignments if self.size > 1 else ():
            weights = {name: weight.cpu() for name, weight in bank.weights(expert).items()}
            sent: list[Any] = [(weights, losses.get(expert))]
            dist.broadcast_object_list(sent, ranks[0])
            weights, losses[expert] = sent[0]
            bank.load(expert, weights)


SINGLE = Crew()


@contextmanager
def launched_crew(device: torch.device | str) -> Iterator[Crew]:
    """Context manager: join the processes that were launched together with this one, if there are any.

    device: of the networks, by which they are joined.
    """
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if size == 1:
        yield SINGLE
        return
    backend = "gloo" if torch.device(device).type == "cpu" else None  # None: gloo, and the device's own
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Crew(size, rank)
    finally:
        dist.destroy_process_group()
