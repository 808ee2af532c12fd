"""Data-free distillation: experts learn to give on noisy images the output that the plain network gives on clean ones.

Knowledge transfer of PPAP (Go et al. 2023). The paper puts fresh noise on finished images; here an expert sees the steps
that the model took on its way to an image, and so learns where a trajectory leads.
"""
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from ..schedules import ExpertSchedule
from ..training.loop import RunOptions, optimize
from .bank import ExpertBank, with_experts
from .processes import SINGLE, Crew, assign
from .samples import BatchSpec, Pairs, SampleStore, trajectory_pairs

log = logging.getLogger(__name__)

OnDistillStep = Callable[[int, int, float], None]
"""(expert, step, loss) after every step; may raise to stop, and the state is saved."""


@dataclass(frozen=True)
class DistillConfig:
    """The training of one expert."""

    steps: int = 1000         # optimiser steps
    batch: int = 32           # images in a step
    lr: float = 1e-3          # first learning rate of AdamW; falls to zero along a cosine
    seed: int = 0
    temperature: float = 1.0  # divides the teacher's logits; 1 changes nothing, below 1 sharpens (the paper: 0.25)
    warm_start: bool = False  # start as the neighbour of less noise ended; else as the plain network

    def fingerprint_fields(self) -> dict[str, object]:
        """Fields for files and `digest`, with the constants by which version 0.1.0 recognises saved work."""
        return {"steps": self.steps, "batch": self.batch, "lr": self.lr, "seed": self.seed, "save_every": 100,
                "temperature": self.temperature, "fresh_noise": False, "warm_start": self.warm_start}


def uses_warm_start(view: str) -> bool:
    """Whether experts of a view gain from a warm start, as measured in docs/benchmark.md under "improvements"."""
    return view == "noisy"


def distill_loss(guider: Guider, bank: ExpertBank, pairs: Pairs, temperature: float = 1.0) -> Tensor:
    """Distance between the expert's output on its inputs and the plain network's on the clean images, (B,).

    guider: the plain one, the teacher. temperature: divides the teacher's logits, where the task has any; neutral: 1.
    """
    with torch.no_grad():
        teacher = guider.predict(pairs.images, clean(pairs.images))
        if TASKS[guider.task].is_logits:
            teacher = teacher / temperature
    student = with_experts(guider, bank)
    output = student.predict(student.to_image(pairs.inputs, pairs.sigma), pairs.sigma)
    return TASKS[guider.task].distance(output, teacher)


def sample_batch(bank: ExpertBank, index: int, store: SampleStore, step: int, config: DistillConfig,
                 part: tuple[int, int] = (0, 1)) -> Pairs:
    """The batch of one training step: a pure function of its arguments, so that a resumed run equals one without a stop.

    part: which of how many parts of it, for processes that train together; neutral: (0, 1), the whole.
    """
    return trajectory_pairs(store, bank.schedule, index, BatchSpec(step, config.batch, config.seed, part), bank.view)


def distill_expert(guider: Guider, bank: ExpertBank, index: int, store: SampleStore,
                   config: DistillConfig = DistillConfig(), options: RunOptions = RunOptions()) -> list[float]:
    """Train one expert on generated images and return the loss of every step.

    guider: the plain one, the teacher. bank: its expert `index` is changed in place.
    options: run_id is completed by all that the result depends on; on_step gets the weights of the expert by name.
    ValueError if no step of the store lies in the expert's interval.
    """
    with torch.inference_mode(False), bank.trainable(index) as parameters:
        def loss(step: int) -> Tensor:
            pairs = sample_batch(bank, index, store, step, config, options.team.part).to(parameters[0].device)
            return options.team.mean(distill_loss(guider, bank, pairs, config.temperature), step)

        return optimize(dict(zip(bank.weights(index), parameters, strict=True)), loss, config.steps, config.lr,
                        f"expert {index} of {guider.name}",
                        options.identified(_run_id(guider, bank, index, store, config)))


def distill(guider: Guider, bank: ExpertBank, store: SampleStore, config: DistillConfig = DistillConfig(),
            folder: Path | None = None, on_step: OnDistillStep | None = None, crew: Crew = SINGLE) -> list[list[float]]:
    """Train every expert of a bank, from the cleanest to the noisiest, and return their losses.

    guider: the plain one, the teacher. bank: changed in place. folder: of the state files, from which a stopped distillation
    resumes; None: nothing is saved. crew: processes that share the work and get all experts; neutral: `SINGLE`.
    ValueError, before any is trained, if an expert has no step to learn from.
    """
    for index in range(len(bank.schedule)):
        sample_batch(bank, index, store, 0, config)
    if bank.left_out:
        log.warning("%s: %s", guider.name, bank.describe_left_out())
    assignments = assign(len(bank.schedule), crew.size, config.batch, config.warm_start)
    by_expert: dict[int, list[float]] = {}
    for index, team in crew.teams(assignments):
        if config.warm_start and index:
            bank.load(index, bank.weights(index - 1))
        options = RunOptions(state_file=folder and Path(folder) / f"expert_{index}.state.safetensors",
                             on_step=on_step and partial(_report, on_step, index), team=team)
        by_expert[index] = distill_expert(guider, bank, index, store, config, options)
    crew.exchange(bank, by_expert, assignments)
    losses = [by_expert[index] for index in range(len(bank.schedule))]
    bank.training_info = {"samples": store.manifest, "images": len(store), **config.fingerprint_fields(),
                          "final_losses": [steps[-1] for steps in losses if steps]}
    return losses


def _report(on_step: OnDistillStep, index: int, step: int, loss: float, _: object) -> None:
    on_step(index, step, loss)


def _run_id(guider: Guider, bank: ExpertBank, index: int, store: SampleStore, config: DistillConfig) -> dict:
    settings = {key: value for key, value in config.fingerprint_fields().items() if key not in ("save_every", "warm_start")}
    return {"guider": guider.name, "fingerprint": bank.fingerprint, "index": index, "edges": list(bank.schedule.edges),
            "view": bank.view, "space": bank.space_name, "lora": {**asdict(bank.lora), "targets": list(bank.lora.targets)},
            "store": store.manifest, "images": len(store), "config": settings,
            **({"start": "neighbour"} if config.warm_start and index else {})}


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
