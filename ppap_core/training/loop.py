"""One resumable training loop for everything that is trained here."""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import load_tensors, optimizer_tensors, restore_optimizer, save_tensors, with_prefix, without_prefix

Losses = list[Any]
"""The loss of every step: a float each, or a list of floats where a loss has several parts."""

RunStep = Callable[[Callable[[], Tensor]], Tensor]
"""Runs a closure (forward and backward pass) and returns its loss; may call it twice, after running out of memory, say."""

OnStep = Callable[[int, Any, Any], None]
"""(step, loss, what is trained as it is now) after every step; may raise to stop the training."""


@dataclass(frozen=True)
class RunOptions:
    """How a training is identified, saved, watched and executed. None of it changes the result.

    run_id: what tells this training from others, as JSON values; it goes into the state file and has to match on resuming.
    state_file: where the state is kept, so that a stopped training resumes and a finished one is only loaded; None: nowhere.
    save_every: steps between two states on disk; a training that stops saves its state in any case.
    on_step: called after every step; None: nobody is told.
    run_step: runs the forward and backward pass of a step; None: they are run once, directly.
    extra_state: further tensors that are saved and restored in place, such as a moving average that on_step updates.
    """

    run_id: dict = field(default_factory=dict)
    state_file: Path | None = None
    save_every: int = 100
    on_step: OnStep | None = None
    run_step: RunStep | None = None
    extra_state: Mapping[str, Tensor] = field(default_factory=dict)

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
    ValueError for the state of another training, and for a loss that is not finite.
    """
    settings = learning_rate if isinstance(learning_rate, AdamW) else AdamW(partial(cosine, learning_rate, steps))
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=settings.weight_decay)
        losses = _resume(options, parameters, optimizer)
        first = len(losses)
        try:
            for step in range(first, steps):
                closure = partial(_backward, optimizer, loss, step, name)
                value = options.run_step(closure) if options.run_step else closure()
                optimizer.param_groups[0]["lr"] = settings.learning_rate(step)
                optimizer.step()
                losses.append(value.tolist())
                if options.on_step:
                    options.on_step(step, losses[-1], parameters)
                if len(losses) % options.save_every == 0:
                    _save(options, parameters, optimizer, losses)
        finally:
            if len(losses) > first:
                _save(options, parameters, optimizer, losses)
    return losses


def _backward(optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor], step: int, name: str) -> Tensor:
    optimizer.zero_grad()
    value = loss(step)
    if not torch.isfinite(value).all():
        raise ValueError(f"the loss of {name} became {value.tolist()} in step {step}: expected a finite number; "
                         "lower the learning rate, or check the network")
    value.sum().backward()
    return value


def _resume(options: RunOptions, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Losses:
    if not options.state_file or not Path(options.state_file).exists():
        return []
    file = Path(options.state_file)
    tensors, run_id = load_tensors(file)
    losses = run_id.pop("losses", [])
    if run_id != options.run_id:
        changed = next(key for key in {**options.run_id, **run_id} if run_id.get(key) != options.run_id.get(key))
        raise ValueError(f"{file.name} is the state of another training ({changed} is {run_id.get(changed)}, "
                         f"expected {options.run_id.get(changed)}): delete it or use another folder")
    for prefix, own in (("trained", parameters), ("extra", options.extra_state)):
        saved = without_prefix(prefix, tensors)
        if saved.keys() != own.keys():
            raise ValueError(f"{file.name} holds {len(saved)} of {len(own)} {prefix} tensors, or others: "
                             "delete it or use another folder")
        for key, value in saved.items():
            own[key].data.copy_(value)
    restore_optimizer(optimizer, without_prefix("optimizer", tensors))
    return losses


def _save(options: RunOptions, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, losses: Losses) -> None:
    if options.state_file:
        tensors = (with_prefix("trained", parameters) | with_prefix("optimizer", optimizer_tensors(optimizer))
                   | with_prefix("extra", dict(options.extra_state)))
        save_tensors(options.state_file, tensors, {**options.run_id, "losses": losses})
