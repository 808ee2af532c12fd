"""One resumable training loop for everything that is trained here."""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .state import Losses, TrainingState, all_finite
from .team import ALONE, Team

RunStep = Callable[[Callable[[], Tensor]], Tensor]
"""Runs a closure (forward and backward pass) and returns its loss; may call it twice, after running out of memory, say."""

OnStep = Callable[[int, Any, Any], None]
"""(step, loss, what is trained as it is now) after every step; may raise to stop the training."""

IsEnough = Callable[[int], bool]
"""(number of steps done) -> whether to end with what is reached; asked before every step, and again on resuming."""


@dataclass(frozen=True)
class RunOptions:
    """How a training is identified, saved, watched and executed. Only `is_enough` changes the result.

    run_id: what tells this training from others, as JSON values; it goes into the state file and has to match on resuming.
    state_file: where the state is kept, so that a stopped training resumes and a finished one is only loaded; None: nowhere.
    save_every: steps between two states on disk; a training that stops saves its state in any case.
    on_step: called after every step; None: nobody is told.
    run_step: runs the forward and backward pass of a step; None: they are run once, directly.
    extra_state: further tensors that are saved and restored in place, such as a moving average that on_step updates.
    team: processes that take part, of which the first one saves; the loss has to be `team.mean` of their parts.
    is_enough: ends the training before its last step; None: never.
    """

    run_id: dict = field(default_factory=dict)
    state_file: Path | None = None
    save_every: int = 100
    on_step: OnStep | None = None
    run_step: RunStep | None = None
    extra_state: Mapping[str, Tensor] = field(default_factory=dict)
    team: Team = ALONE
    is_enough: IsEnough | None = None

    def identified(self, run_id: dict) -> "RunOptions":
        """Add entries to run_id."""
        return replace(self, run_id={**self.run_id, **run_id})

    def reporting(self, trained: Any) -> "RunOptions":
        """Hand `trained` to on_step in place of the parameters by name."""
        return replace(self, on_step=self.on_step and partial(_report, self.on_step, trained))


def _report(on_step: OnStep, trained: Any, step: int, loss: Any, _: Any) -> None:
    on_step(step, loss, trained)


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimiser: the learning rate of each step, and weight decay (0: none)."""

    learning_rate: Callable[[int], float]
    weight_decay: float = 0.0


def cosine(peak: float, steps: int, step: int) -> float:
    """Learning rate of a step that falls from `peak` to zero along a cosine."""
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def optimize(parameters: dict[str, Tensor], loss: Callable[[int], Tensor], steps: int, learning_rate: float | AdamW,
             name: str, options: RunOptions = RunOptions()) -> Losses:
    """Minimise loss(step) by AdamW (Loshchilov and Hutter 2019), resuming from options.state_file, and return all losses.

    parameters: by name, with requires_grad on; changed in place.
    loss: () or (n,), the parts of which are summed; a function of the step alone, so that a resumed run equals one that
        never stopped.
    learning_rate: the first step's, from where it falls to zero along a cosine; an `AdamW` for anything else.
    name: of what is trained, for error messages.
    A state that cannot be written on the way, or is damaged, is told in the log. ValueError for the state of another
    training, and for a loss, gradient or result that is not finite; the last good state is then kept, and the same training
    at a lower rate goes on from there.
    """
    settings = learning_rate if isinstance(learning_rate, AdamW) else AdamW(partial(cosine, learning_rate, steps))
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=settings.weight_decay)
        state = TrainingState(options.run_id, options.state_file, settings.learning_rate(0),
                              {"trained": parameters, "extra": options.extra_state}, optimizer, options.team.is_first)
        state.resume()
        first = len(state.losses)
        try:
            for step in range(first, steps):
                if options.is_enough and options.is_enough(step):
                    break
                closure = partial(_backward, optimizer, loss, step)
                value = (options.run_step(closure) if options.run_step else closure()).tolist()
                options.team.add_gradients(parameters.values())
                _require_finite_gradient(parameters, step)
                state.remember(value)
                if step > first and step % options.save_every == 0:  # only now is that state known to be good
                    state.save()
                optimizer.param_groups[0]["lr"] = settings.learning_rate(step)
                optimizer.step()
                state.losses.append(value)
                if options.on_step:
                    options.on_step(step, value, parameters)
            if not all_finite(parameters.values()):
                raise _NotFiniteError(f"the result became infinite in step {len(state.losses) - 1}")
        except _NotFiniteError as error:
            raise ValueError(_failure(name, error, state.save_failed() if len(state.losses) > first else None)) from error
        except BaseException:
            _save_last(state, first)
            raise
        _save_last(state, first)
    return state.losses


class _NotFiniteError(ArithmeticError):
    """A training that went wrong."""


def _save_last(state: TrainingState, first: int) -> None:
    if len(state.losses) > first:
        state.save(is_last=True)


def _failure(name: str, error: Exception, kept: int | None) -> str:
    kept_words = "" if kept is None else f". The state of step {kept} is kept, and a lower rate goes on from there"
    return (f"the training of {name} failed: {error}, expected finite numbers; lower the learning rate, or check the "
            f"network{kept_words}")


def _backward(optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor], step: int) -> Tensor:
    optimizer.zero_grad()
    value = loss(step)
    if not torch.isfinite(value).all():
        raise _NotFiniteError(f"the loss became {value.tolist()} in step {step}")
    value.sum().backward()
    return value


def _require_finite_gradient(parameters: Mapping[str, Tensor], step: int) -> None:
    if not all_finite(tensor.grad for tensor in parameters.values() if tensor.grad is not None):
        raise _NotFiniteError(f"the gradient became infinite or nan in step {step}")
