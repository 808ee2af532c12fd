"""The end of a training where what it is for no longer rises."""
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .loop import IsEnough, RunOptions

DECAY = 0.25  # steps in which the learning rate falls to zero, over those before


@dataclass(frozen=True)
class PlateauRule:
    """When a training turns to its end: the rate stays until then, and falls to zero within a quarter as many steps.

    The end begins with the weights of the best check, since a training that goes on too long learns by heart.

    steps: at most, the fall included. every: steps between two checks. patience: checks whose mean has to be above that of
    as many before them.
    """

    steps: int
    every: int
    patience: int


class Plateau:
    """Learning rate and end of a training by a measure of what it is for.

    measure: () -> how good what is trained is, higher is better; asked once for each check. peak: the learning rate.
    weights: what is trained, by name; changed in place when the training turns to its end.
    history: of the measure, a row for each check, NaN where there is none yet. It and the best weights are kept with the
    state of the training, so that a resumed one ends where one without a stop does.
    """

    def __init__(self, rule: PlateauRule, peak: float, measure: Callable[[], float], weights: Mapping[str, Tensor]):
        self.rule, self.peak, self.measure, self.weights = rule, peak, measure, weights
        self.history = torch.full((self._latest_turn() // rule.every + 1,), math.nan, dtype=torch.float64)
        self.best = {f"best.{name}": weight.detach().clone() for name, weight in weights.items()}

    def _latest_turn(self) -> int:
        return int(self.rule.steps / (1 + DECAY))

    def turn(self) -> int | None:
        """Step from which the learning rate falls, by the checks so far; None: not yet known."""
        for check in range(2 * self.rule.patience - 1, len(self.history)):
            before, after = self.history[check + 1 - 2 * self.rule.patience:check + 1].chunk(2)
            if after.mean() <= before.mean():  # not where a check is still NaN
                return check * self.rule.every
        return None

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        turn, end = self._turn_and_end()
        return self.peak if step < turn else self.peak * (end - step) / (end - turn)

    def is_enough(self, step: int) -> bool:
        """Check, where a check is due, and return whether the training is over after so many steps."""
        turn, end = self._turn_and_end()
        check, rest = divmod(step, self.rule.every)
        if rest == 0 and step <= turn and self.history[check].isnan():
            self.history[check] = self.measure()
            if self.history[check] >= self.history.nan_to_num(-math.inf).max():
                _copy(self.weights.values(), self.best.values())
            turn, end = self._turn_and_end()
        if step == turn:
            _copy(self.best.values(), self.weights.values())
        return step >= end

    def _turn_and_end(self) -> tuple[int, int]:
        turn = self.turn()
        if turn is None:
            return self._latest_turn(), self.rule.steps
        return turn, min(math.ceil(turn * (1 + DECAY)), self.rule.steps)

    def added_to(self, options: RunOptions) -> RunOptions:
        """The options of a training that keeps this in its state, and ends by it if nothing ends it before."""
        return replace(options, extra_state={**options.extra_state, "history": self.history, **self.best},
                       is_enough=partial(_either, options.is_enough, self.is_enough))


@torch.no_grad()
def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _either(first: IsEnough | None, second: IsEnough, step: int) -> bool:
    return bool(first and first(step)) or second(step)
