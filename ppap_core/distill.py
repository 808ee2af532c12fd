"""Data-free distillation: the untouched network answers on a clean generated image, an expert learns to give that answer
on the noisy one.

Knowledge transfer of PPAP (Go et al. 2023), with experts that do not depend on one another.
"""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .experts import ExpertBank, with_experts
from .files import load_tensors, optimizer_tensors, restore_optimizer, save_tensors, with_prefix, without_prefix
from .guider import Guider, clean
from .noise import as_seen, expand, seeded
from .samples import SampleStore
from .sampling import Denoiser
from .tasks import TASKS


@dataclass(frozen=True)
class DistillConfig:
    """The training of one expert."""

    steps: int = 1000      # optimiser steps for each expert
    batch: int = 32        # images in a step
    lr: float = 1e-3       # AdamW, cosine to zero
    seed: int = 0
    save_every: int = 100  # steps between states on disk
    temperature: float = 1.0  # of the teacher's classes; 1 changes nothing, below it sharpens (the paper: 0.25)


def distill_loss(guider: Guider, bank: ExpertBank, see: Denoiser, images: Tensor, diffused: Tensor, sigma: Tensor,
                 noise: Tensor, temperature: float = 1.0) -> Tensor:
    """Distance of the expert's answer on what it sees of a noisy image from the plain answer on the clean one, (B,).

    guider: the plain one, the teacher. see(x, sigma): what the experts look at, `as_seen` for the noisy view or the
    denoiser for the denoised view. images (B, 3, H, W); diffused: the latents they were decoded from, or the images
    again; noise like it; sigma (B,), all in one interval.
    """
    with torch.no_grad():
        teacher = guider.predict(images, clean(images))
        if guider.task in ("class", "segmentation", "mask"):
            teacher = teacher / temperature
        seen = see(diffused + expand(sigma, diffused) * noise, sigma)
    student = with_experts(guider, bank)
    return TASKS[guider.task].distance(student.predict(student.look(seen, sigma), sigma), teacher)


def view_of(bank: ExpertBank, denoise: Denoiser | None) -> Denoiser:
    """What the experts of a bank look at: a function (x, sigma) -> image. ValueError without the denoiser it needs."""
    if bank.view == "noisy":
        return as_seen
    if denoise is None:
        raise ValueError("experts of the denoised view look at the model's predictions: connect the model")
    return denoise


def draw_batch(bank: ExpertBank, index: int, store: SampleStore, step: int, size: int,
               seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, what was diffused, noise levels and noise of a step: a pure function of its arguments, so that a resumed
    run is the same run."""
    generator = seeded(seed, index, step)
    images = store.batch(step, size, seed + index * 2**64)
    diffused = store.latent_batch(step, size, seed + index * 2**64)
    flip = torch.rand(size, generator=generator) < 0.5
    if diffused is None:  # the mirror image of a latent is not the latent of the mirror image
        diffused = images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return images, diffused, bank.schedule[index].sample(size, generator), torch.randn(diffused.shape, generator=generator)


def distill_expert(guider: Guider, bank: ExpertBank, index: int, store: SampleStore, denoise: Denoiser | None = None,
                   config: DistillConfig = DistillConfig(), state_file: Path | None = None,
                   on_step: Callable[[int, int, float], None] | None = None) -> list[float]:
    """Train one expert on generated images only; returns the loss of every step.

    state_file: where weights, optimiser and losses are kept; an existing one is gone on with, and a finished one is
    only loaded. on_step(index, step, loss) may raise to stop: the state is saved first, and going on later gives the
    same expert as a run without a stop.
    """
    see, about = view_of(bank, denoise), _about(guider, bank, index, store, config)
    with torch.inference_mode(False), torch.enable_grad(), bank.trainable(index) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
        losses = _resume(state_file, about, bank, index, optimizer)
        device, done = parameters[0].device, len(losses)
        try:
            for step in range(done, config.steps):
                batch = (part.to(device) for part in draw_batch(bank, index, store, step, config.batch, config.seed))
                loss = distill_loss(guider, bank, see, *batch, config.temperature).mean()
                if not torch.isfinite(loss):
                    raise ValueError(f"the loss of expert {index} became {loss.item()} in step {step}: expected a "
                                     f"finite number; check the network {guider.name} or lower the learning rate")
                optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if state_file and len(losses) % config.save_every == 0:
                    _save(state_file, about, bank, index, optimizer, losses)
                if on_step:
                    on_step(index, step, losses[-1])
        finally:
            if state_file and len(losses) > done:
                _save(state_file, about, bank, index, optimizer, losses)
    return losses


def distill(guider: Guider, bank: ExpertBank, store: SampleStore, denoise: Denoiser | None = None,
            config: DistillConfig = DistillConfig(), folder: Path | None = None,
            on_step: Callable[[int, int, float], None] | None = None) -> list[list[float]]:
    """Train every expert of a bank, from the cleanest to the noisiest, each from its own start; returns their losses."""
    losses = [distill_expert(guider, bank, index, store, denoise, config,
                             folder and Path(folder) / f"expert_{index}.state.safetensors", on_step)
              for index in range(len(bank.schedule))]
    bank.recipe = {"samples": store.recipe, "images": len(store), **asdict(config),
                   "final_losses": [each[-1] for each in losses if each]}
    return losses


@torch.no_grad()
def disagreement(guider: Guider, other: Guider, store: SampleStore, see: Denoiser, sigmas: list[float],
                 size: int = 64, device: torch.device | str = "cpu") -> list[float]:
    """Mean distance of `other`, on what it sees at each noise level, from the plain guider's answer on the clean image.

    With the plain guider as the other it shows where experts are needed; with the experts, what they learned.
    """
    images, latents = store.batch(0, size, seed=-1).to(device), store.latent_batch(0, size, seed=-1)
    diffused = images if latents is None else latents.to(device)
    noise = torch.randn(diffused.shape, generator=torch.Generator().manual_seed(0)).to(device)
    teacher, out = guider.predict(images, clean(images)), []
    for sigma in sigmas:
        level = images.new_full((len(images),), sigma)
        seen = other.look(see(diffused + expand(level, diffused) * noise, level), level)
        out.append(TASKS[guider.task].distance(other.predict(seen, level), teacher).mean().item())
    return out


def _about(guider: Guider, bank: ExpertBank, index: int, store: SampleStore, config: DistillConfig) -> dict:
    return {"guider": guider.name, "fingerprint": bank.fingerprint, "index": index, "edges": list(bank.schedule.edges),
            "view": bank.view, "space": bank.space_name,
            "lora": {**asdict(bank.lora), "targets": list(bank.lora.targets)},
            "store": store.recipe, "images": len(store),
            "config": {key: value for key, value in asdict(config).items() if key != "save_every"}}


def _resume(state_file: Path | None, about: dict, bank: ExpertBank, index: int,
            optimizer: torch.optim.Optimizer) -> list[float]:
    if not state_file or not Path(state_file).exists():
        return []
    tensors, found = load_tensors(state_file)
    losses = found.pop("losses", [])
    if found != about:
        changed = next(key for key in {**about, **found} if found.get(key) != about.get(key))
        raise ValueError(f"{Path(state_file).name} is the state of another distillation ({changed} is "
                         f"{found.get(changed)}, expected {about.get(changed)}): delete it or use another folder")
    bank.load(index, without_prefix("expert", tensors))
    restore_optimizer(optimizer, without_prefix("optimizer", tensors))
    return losses


def _save(state_file: Path, about: dict, bank: ExpertBank, index: int,
          optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    save_tensors(state_file, with_prefix("expert", bank.weights(index))
                 | with_prefix("optimizer", optimizer_tensors(optimizer)), about | {"losses": losses})
