"""State of a training: in its file, and the last good one in memory, which a lower learning rate goes back to."""
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..io.files import (
    DamagedFileError,
    FileInUseError,
    load_tensors,
    optimizer_tensors,
    read_header,
    restore_optimizer,
    save_tensors,
    with_prefix,
    without_prefix,
)
from ..io.values import bare, is_number, is_whole, shown

Losses = list[Any]
"""The loss of every step: a float each, or a list of floats where a loss has several parts."""

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
REMEMBER_EVERY = 10  # steps between two states that are remembered in memory
EXPLODED = 10.0      # times the median loss: a state with a greater one is not worth going back to

log = logging.getLogger(__name__)


class TrainingState:
    """The parameters, the optimiser and the losses of a training, and the file that keeps them.

    run_id: what tells this training from others, as JSON values. file: None keeps nothing. rate: its first learning rate.
    tensors: by group and name, "trained" and "extra". writes: whether this process saves; else another one does.
    """

    def __init__(self, run_id: dict, file: Path | None, rate: float, tensors: Mapping[str, Mapping[str, Tensor]],
                 optimizer: torch.optim.Optimizer, writes: bool = True):
        self.run_id, self.file, self.rate = run_id, Path(file) if file else None, rate
        self.groups, self.optimizer, self.writes = tensors, optimizer, writes
        self.losses: Losses = []
        self._good: tuple[int, dict[str, Tensor]] | None = None
        self._told = False

    def resume(self) -> None:
        """Load the state in the file; without one, the last good state of the same training at a higher rate, which failed.

        A damaged file is named in the log, and the training starts anew. ValueError for the state of another training.
        """
        if not self.file:
            return
        file = self.file if self.file.exists() else next(
            (each for each in _states_beside(self.file) if self._is_slower_than(_header(each))), None)
        try:
            if file:
                self._load(file)
        except DamagedFileError as error:
            log.warning("%s The training starts anew.", error)

    def _load(self, file: Path) -> None:
        tensors, header = load_tensors(file)
        run_id = dict(header)
        losses: Any = run_id.pop("losses", [])
        failed: Any = run_id.pop("failed", None)
        if not isinstance(losses, list) or not all(map(_is_loss, losses)):
            raise DamagedFileError(f"{file.name} does not hold the losses of a training.")
        if run_id != self.run_id:
            if not self._is_slower_than(header):
                changed = next(key for key in {**self.run_id, **run_id} if run_id.get(key) != self.run_id.get(key))
                raise ValueError(f"{file.name} is the state of another training ({bare(changed)} is "
                                 f"{shown(run_id.get(changed))}, expected {shown(self.run_id.get(changed))}): delete it or "
                                 "use another folder")
            tensors, losses = without_prefix("good", tensors), losses[:failed["step"]]
            log.warning("this training did not stay finite at a learning rate of %g: it goes on at %g from step %d, where "
                        "it was in order", failed["rate"], self.rate, failed["step"])
        self._restore(file.name, tensors)
        self.losses[:] = losses

    def _restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        for prefix, own in self.groups.items():
            saved = without_prefix(prefix, tensors)
            if saved.keys() != own.keys():
                raise ValueError(f"{name} holds {len(saved)} of {len(own)} {prefix} tensors, or others: "
                                 "delete it or use another folder")
            if wrong := [key for key, value in saved.items() if value.shape != own[key].shape]:
                raise DamagedFileError(f"{name} holds no {wrong[0]} of this training.")
            for key, value in saved.items():
                own[key].data.copy_(value)
        _restore_optimizer(name, self.optimizer, without_prefix("optimizer", tensors))

    def _is_slower_than(self, other: dict) -> bool:
        """Whether a header is that of this training at a higher rate, at which it failed."""
        failed: Any = other.get("failed")
        run_id = {key: value for key, value in other.items() if key not in ("losses", "failed")}
        return (_is_failure(failed) and self.rate < failed["rate"]
                and _without_rate(run_id) == _without_rate(self.run_id))

    def remember(self, loss: Any) -> None:
        """Keep a copy of the state that has just given a finite loss, now and then, unless that shows it going wrong."""
        usual = median(abs(_total(each)) for each in self.losses) if self.losses else float("inf")
        is_due = self._good is None or len(self.losses) % REMEMBER_EVERY == 0
        if self.file and is_due and abs(_total(loss)) <= EXPLODED * usual:
            self._good = len(self.losses), {name: value.detach().to("cpu", copy=True)
                                            for name, value in self._tensors().items()}

    def save(self, is_last: bool = False) -> None:
        """Write the file. A state on the way that cannot be written is told in the log, and so is one that is held open.

        is_last: OSError in words if it cannot be written for another reason.
        """
        try:
            self._write(self._tensors(), {"losses": self.losses})
        except OSError as error:
            if is_last and not isinstance(error, FileInUseError):
                raise
            if not self._told:
                log.warning("%s The training itself goes on.", error)
            self._told = True

    def save_failed(self) -> int | None:
        """Write the state before a step that was not finite, and the last good one; returns the step of that, or None."""
        if self._good is None:
            return None
        step, good = self._good
        reached = self._tensors() if all_finite(self.groups["trained"].values()) else good
        losses = self.losses if reached is not good else self.losses[:step]
        try:
            self._write(reached | with_prefix("good", good), {"losses": losses, "failed": {"step": step, "rate": self.rate}})
        except OSError as error:  # the failure of the training itself is to be told
            log.warning("%s", error)
            return None
        return step

    def _tensors(self) -> dict[str, Tensor]:
        tensors = with_prefix("optimizer", optimizer_tensors(self.optimizer))
        for prefix, own in self.groups.items():
            tensors |= with_prefix(prefix, dict(own))
        return tensors

    def _write(self, tensors: dict[str, Tensor], header: dict) -> None:
        if self.file and self.writes:
            save_tensors(self.file, tensors, {**self.run_id, **header})


def steps_done(file: Path | None) -> int:
    """Number of steps in the file of a state; 0 where there is none, or none that can be read."""
    losses = _header(file).get("losses", []) if file else []
    return len(losses) if isinstance(losses, list) else 0


def _restore_optimizer(name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore an optimiser, unless a file has other numbers for it than its parameters need."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {f"{index}.{part}": parameter.shape for index, parameter in enumerate(parameters) for part in MOMENTS}
    shapes |= {f"{index}.step": torch.Size() for index in range(len(parameters))}
    if not all(shapes.get(key) == tensor.shape for key, tensor in tensors.items()):
        raise DamagedFileError(f"{name} holds no state of this optimiser.")
    restore_optimizer(optimizer, tensors)


def _is_failure(value: Any) -> bool:
    return isinstance(value, dict) and is_whole(value.get("step"), 0, math.inf) and is_number(value.get("rate"))


def _is_loss(value: Any) -> bool:
    return all(map(is_number, value)) if isinstance(value, list) else is_number(value)


def all_finite(tensors: Any) -> bool:
    """Whether no value of some tensors is NaN or infinite."""
    peaks = [tensor.detach().abs().amax().float() for tensor in tensors if tensor.numel()]
    return bool(torch.stack(peaks).isfinite().all()) if peaks else True


def _total(loss: Any) -> float:
    return sum(loss) if isinstance(loss, list) else float(loss)


def _without_rate(run_id: dict) -> dict:
    return {key: {name: each for name, each in value.items() if name != "lr"} if isinstance(value, dict) else value
            for key, value in run_id.items()}


def _states_beside(file: Path) -> Iterator[Path]:
    """Yield the states of other trainings: in the same folder, and of the same name in the folders beside it."""
    yield from sorted(file.parent.glob("*.state.safetensors"))
    yield from sorted(file.parent.parent.glob(f"*/{file.name}"))


def _header(file: Path) -> dict:
    try:
        header = json.loads(read_header(file)[1].get("ppap", "{}"))
    except (OSError, ValueError):  # another one's damage is no concern of this training
        return {}
    return header if isinstance(header, dict) else {}
