"""Processes that train one thing together: each takes a part of every batch, and their gradients are summed."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class _Sum(torch.autograd.Function):
    """The sum over processes, with the gradient of the process's own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True)
class Team:
    """The processes that train one thing, each on its part of every batch. Neutral: the defaults, a single one."""

    group: Any = None  # of torch.distributed
    rank: int = 0      # of this process among them
    size: int = 1

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many parts of a batch this process reads."""
        return self.rank, self.size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that saves what they reach together."""
        return self.rank == 0

    def mean(self, losses: Tensor, step: int) -> Tensor:
        """Mean of the losses (B,) of all parts; its gradient is that of this part, until `add_gradients`.

        step: of the training. ValueError where another process is at another one.
        """
        if self.size == 1:
            return losses.mean()
        parts = torch.stack([losses.sum(), *losses.new_tensor([len(losses), step])])
        total, count, steps = _Sum.apply(parts.double(), self.group)
        if steps != step * self.size:
            raise ValueError(f"{self.size} processes train together, and are at other steps than {step}: expected a folder "
                             "for states that all of them read")
        return total / count.detach()

    def of_first(self, measure: Callable[[], float]) -> float:
        """A number that the first process measures, for all of them: rounding may differ, and what follows must not."""
        if self.size == 1:
            return measure()
        value = torch.tensor([measure() if self.is_first else 0.0], dtype=torch.float64)
        dist.broadcast(value, dist.get_global_rank(self.group, 0), self.group)
        return value.item()

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of parameters over the processes, in place."""
        if self.size == 1:
            return
        gradients = [tensor.grad for tensor in parameters if tensor.grad is not None]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=self.group)
        for gradient, part in zip(gradients, total.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Team()
