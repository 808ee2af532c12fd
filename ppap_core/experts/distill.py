"""Data-free distillation: the untouched network answers on a generated image, an expert learns to give that answer while
the image is still noise.

Knowledge transfer of PPAP (Go et al. 2023). The paper puts fresh noise on finished images; here an expert sees the steps
that the model took on its way to the image, and so learns where a way leads.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from ..noise import to_vp
from ..sampling import Denoiser
from ..schedules import ExpertSchedule
from ..training.loop import RunOptions, optimize
from .bank import ExpertBank, with_experts
from .samples import Pairs, SampleStore, fresh_pairs, trajectory_pairs


@dataclass(frozen=True)
class DistillConfig:
    """The training of one expert."""

    steps: int = 1000      # optimiser steps for each expert
    batch: int = 32        # images in a step
    lr: float = 1e-3       # AdamW, cosine to zero
    seed: int = 0
    save_every: int = 100  # steps between states on disk
    temperature: float = 1.0  # of the teacher's classes; 1 changes nothing, below it sharpens (the paper: 0.25)
    fresh_noise: bool = False  # images under noise that is drawn anew, as in the paper; else steps that led to them
    warm_start: bool = False   # an expert starts as its neighbour of less noise ended; else as the plain network


def uses_warm_start(view: str) -> bool:
    """Whether experts of a view had better start as their neighbour ended: measured in docs/benchmark.md, "improvements"."""
    return view == "noisy"


def distill_loss(guider: Guider, bank: ExpertBank, pairs: Pairs, temperature: float = 1.0) -> Tensor:
    """Distance of the expert's answer on what it sees of a noisy image from the plain answer on the clean one, (B,).

    guider: the plain one, the teacher.
    """
    with torch.no_grad():
        teacher = guider.predict(pairs.images, clean(pairs.images))
        if TASKS[guider.task].is_logits:
            teacher = teacher / temperature
    student = with_experts(guider, bank)
    return TASKS[guider.task].distance(student.predict(student.to_image(pairs.seen, pairs.sigma), pairs.sigma), teacher)


def sample_batch(bank: ExpertBank, index: int, store: SampleStore, step: int, config: DistillConfig,
               denoise: Denoiser | None = None) -> Pairs:
    """What a training step learns from: a pure function of its arguments, so that a resumed run is the same run."""
    place = (store, bank.schedule, index, step, config.batch, config.seed)
    if not config.fresh_noise:
        return trajectory_pairs(*place, bank.view)
    if bank.view == "denoised" and denoise is None:
        raise ValueError("with fresh noise, experts of the denoised view look at the model's predictions: give the denoiser")
    return fresh_pairs(*place, to_vp if bank.view == "noisy" else denoise, next(bank.parameters()).device)


def distill_expert(guider: Guider, bank: ExpertBank, index: int, store: SampleStore,
                   config: DistillConfig = DistillConfig(), options: RunOptions = RunOptions(),
                   denoise: Denoiser | None = None) -> list[float]:
    """Train one expert on generated images only; returns the loss of every step.

    options: run_id is completed by what the expert is distilled from and how. denoise: the model, which only fresh noise in
    the denoised view needs.
    """
    with torch.inference_mode(False), bank.trainable(index) as parameters:
        device = parameters[0].device

        def loss(step: int) -> Tensor:
            pairs = sample_batch(bank, index, store, step, config, denoise)
            return distill_loss(guider, bank, pairs.to(device), config.temperature).mean()

        options = replace(options.identified(_run_id(guider, bank, index, store, config)), save_every=config.save_every)
        return optimize(dict(zip(bank.weights(index), parameters, strict=True)), loss, config.steps, config.lr,
                        f"expert {index} of {guider.name}", options)


def distill(guider: Guider, bank: ExpertBank, store: SampleStore, config: DistillConfig = DistillConfig(),
            folder: Path | None = None, on_step: Callable[[int, int, float], None] | None = None,
            denoise: Denoiser | None = None) -> list[list[float]]:
    """Train every expert of a bank, from the cleanest to the noisiest; returns their losses.

    ValueError, before any is trained, if one has nothing to learn from.
    """
    for index in range(0 if config.fresh_noise else len(bank.schedule)):
        sample_batch(bank, index, store, 0, config)
    losses = []
    for index in range(len(bank.schedule)):
        if config.warm_start and index:
            bank.load(index, bank.weights(index - 1))
        state_file = folder and Path(folder) / f"expert_{index}.state.safetensors"
        options = RunOptions(state_file=state_file, on_step=on_step and partial(_report, on_step, index))
        losses.append(distill_expert(guider, bank, index, store, config, options, denoise))
    bank.recipe = {"samples": store.recipe, "images": len(store), **asdict(config),
                   "final_losses": [each[-1] for each in losses if each]}
    return losses


@torch.no_grad()
def teacher_distance(guider: Guider, other: Guider, store: SampleStore, schedule: ExpertSchedule, size: int = 64,
                 device: torch.device | str = "cpu") -> list[tuple[float, float]]:
    """(noise level, distance) for each interval of a schedule: how far `other`, on what it sees of noisy images, is on
    average from the plain guider's answer on the images that they became.

    With the plain guider as the other it shows where experts are needed; with the experts, what they learned.
    """
    found = []
    for index in range(len(schedule)):
        pairs = trajectory_pairs(store, schedule, index, 0, size, -1, other.view).to(device)
        teacher, distances = guider.predict(pairs.images, clean(pairs.images)), []
        for level in pairs.sigma.unique():  # an expert answers for one interval at a time, which the schedule may cut
            mine = pairs.sigma == level
            seen = other.to_image(pairs.seen[mine], pairs.sigma[mine])
            distances.append(TASKS[guider.task].distance(other.predict(seen, pairs.sigma[mine]), teacher[mine]))
        found.append((float(pairs.sigma.log().mean().exp()), float(torch.cat(distances).mean())))
    return found


def _report(on_step: Callable[[int, int, float], None], index: int, step: int, loss: float, _: object) -> None:
    on_step(index, step, loss)


def _run_id(guider: Guider, bank: ExpertBank, index: int, store: SampleStore, config: DistillConfig) -> dict:
    return {"guider": guider.name, "fingerprint": bank.fingerprint, "index": index, "edges": list(bank.schedule.edges),
            "view": bank.view, "space": bank.space_name,
            "lora": {**asdict(bank.lora), "targets": list(bank.lora.targets)},
            "store": store.recipe, "images": len(store),
            "config": {key: value for key, value in asdict(config).items() if key not in ("save_every", "warm_start")},
            **({"start": "neighbour"} if config.warm_start and index else {})}
