"""Training that can be stopped: the loop of everything that this pack trains."""
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..io.files import load_tensors, optimizer_tensors, restore_optimizer, save_tensors, with_prefix, without_prefix

Losses = list[float] | list[list[float]]
"""Of every step, or of every step in parts."""

RunStep = Callable[[Callable[[], Tensor]], Tensor]
"""(the passes of a step) -> what they return"""


def optimize(parameters: dict[str, Tensor], loss: Callable[[int], Tensor], steps: int, lr: float, what: str, about: dict,
             state_file: Path | None = None, save_every: int = 100, on_step: Callable[[int, float], None] | None = None,
             run_step: RunStep | None = None) -> Losses:
    """Lower loss(step) by AdamW with a rate that falls to zero like a cosine; returns the loss of every step.

    parameters: by name, with requires_grad on; they are changed in place. loss(step) must be a function of the step alone,
    so that a run that was stopped and goes on is the same run; it may hold several parts, whose sum is lowered.
    state_file: where parameters, optimiser and losses are kept, with `about`, which tells this training from others; an
    existing one is gone on with, and a finished one is only loaded. on_step(step, loss) may raise to stop: the state is
    saved first. attempt: does the passes of a step, which may be done again; None: once, as they are.
    ValueError for a state of another training, and for a loss of `what` that is not finite.
    """
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
        losses = _resume(state_file, about, parameters, optimizer)
        done = len(losses)

        def passes(step: int) -> Tensor:
            optimizer.zero_grad()
            value = loss(step)
            if not torch.isfinite(value).all():
                raise ValueError(f"the loss of {what} became {value.tolist()} in step {step}: expected a finite number; "
                                 "lower the learning rate, or check the network")
            value.sum().backward()
            return value

        try:
            for step in range(done, steps):
                once = partial(passes, step)
                value = run_step(once) if run_step else once()
                optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.step()
                losses.append(value.tolist())
                if state_file and len(losses) % save_every == 0:
                    _save(state_file, about, parameters, optimizer, losses)
                if on_step:
                    on_step(step, losses[-1])
        finally:
            if state_file and len(losses) > done:
                _save(state_file, about, parameters, optimizer, losses)
    return losses


def _resume(state_file: Path | None, about: dict, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Losses:
    if not state_file or not Path(state_file).exists():
        return []
    tensors, found = load_tensors(state_file)
    losses = found.pop("losses", [])
    if found != about:
        changed = next(key for key in {**about, **found} if found.get(key) != about.get(key))
        raise ValueError(f"{Path(state_file).name} is the state of another training ({changed} is {found.get(changed)}, "
                         f"expected {about.get(changed)}): delete it or use another folder")
    trained = without_prefix("trained", tensors)
    if trained.keys() != parameters.keys():
        raise ValueError(f"{Path(state_file).name} holds {len(trained)} of {len(parameters)} trained tensors, or others: "
                         "delete it or use another folder")
    for name, value in trained.items():
        parameters[name].data.copy_(value)
    restore_optimizer(optimizer, without_prefix("optimizer", tensors))
    return losses


def _save(state_file: Path, about: dict, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer,
          losses: Losses) -> None:
    trained = {name: parameter.detach() for name, parameter in parameters.items()}
    save_tensors(state_file, with_prefix("trained", trained) | with_prefix("optimizer", optimizer_tensors(optimizer)),
                 about | {"losses": losses})
