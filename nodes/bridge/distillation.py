"""Images of a MODEL's own, and experts that learn from the way to them."""
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.sd
import torch
from torch import Tensor

from ...ppap_core.experts.bank import ExpertBank, LoraSpec, base_network
from ...ppap_core.experts.distill import DistillConfig, distill
from ...ppap_core.experts.samples import SampleStore, Trajectories, TrajectoryRecorder
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.guiders.latents import LatentSpace
from ...ppap_core.io.hashing import digest
from ...ppap_core.rng import seeded_noise
from ...ppap_core.schedules import ExpertSchedule
from . import latents, noise_levels, paths
from .autograd import autograd
from .latents import Patcher
from .memory import load_to_train
from .noise_levels import PURE_NOISE
from .progress import progress, progress_with_plot
from .tensors import image_from_comfy


@dataclass(frozen=True)
class Samples:
    """Generated images and steps that led to them."""

    store: SampleStore
    space: LatentSpace | None = None  # the latents that were diffused; None for pixels


def generate_samples(samples: Samples, count: int, latent: dict, model: Patcher, vae: comfy.sd.VAE | None, steps: int,
                     *settings: Any) -> None:
    """Fill the store with the model's own images and steps that led to them, as many at once as the LATENT holds.

    settings: cfg, sampler name, scheduler, positive, negative.
    """
    shape, done = latents.resize_empty_latent(model, latent).shape, len(samples.store)
    report, recording_model, recorder = progress(count * steps), model.clone(), TrajectoryRecorder()

    def note(args: dict) -> Tensor:
        x, sigma = noise_levels.to_ve(args["model"].model_sampling, args["input"], args["sigma"])
        if sigma.isfinite().all():
            recorder.record(x, sigma, args["denoised"])
        return args["denoised"]

    def generate(seeds: list[int]) -> tuple[Tensor, Trajectories]:
        made, paths = zip(*(one_batch(seeds[i:i + shape[0]]) for i in range(0, len(seeds), shape[0])), strict=True)
        images = made if vae is None else [image_from_comfy(vae.decode(part)) for part in made]
        return torch.cat(images), Trajectories(*map(torch.cat, zip(*paths, strict=True)))

    def one_batch(seeds: list[int]) -> tuple[Tensor, Trajectories]:
        nonlocal done
        noise = seeded_noise(seeds, shape[1:])
        made = comfy.sample.sample(recording_model, noise, steps, *settings, torch.zeros_like(noise), seed=seeds[0],
                                   disable_pbar=True,
                                   callback=lambda step, x0, *_: report(done * steps + (step + 1) * len(seeds),
                                                                        latents.preview(model, x0[:1])))
        done += len(seeds)
        return made, recorder.trajectories(seeds)

    recording_model.set_model_sampler_post_cfg_function(note)
    samples.store.fill(count, generate)


def space_to_distil(model: Patcher, vae: comfy.sd.VAE | None) -> LatentSpace | None:
    """The latents that experts will look at; None for pixels. ValueError for a model that cannot be distilled for."""
    latents.require_supported(model)
    if model.get_model_object("latent_format").latent_dimensions == 3:
        raise ValueError("this model diffuses frames, and experts learn from single images so far: use the plain guider, "
                         "which judges frame by frame")
    if not latents.is_pixel(model) and vae is None:
        raise ValueError("this model diffuses latents, and the untouched network looks at images: connect the model's VAE")
    return latents.space_of(model)


def open_store(name: str, manifest: dict) -> SampleStore:
    """The store of a name. ValueError if it holds images of another manifest."""
    return SampleStore(paths.output_folder("ppap_samples", paths.checked_file_name(name)), manifest)


def schedule_for(samples: Samples, experts: int, sigma_min: float, sigma_max: float) -> ExpertSchedule:
    """Noise ranges, each with an equal share of the steps that led to the samples. 0: from the lowest or to the highest."""
    levels = [sigma for sigma in samples.store.sigmas.unique().tolist() if 0 < sigma <= PURE_NOISE]
    lowest, highest = sigma_min or min(levels, default=0.0), sigma_max or max(levels, default=0.0)
    if not 0 < lowest < highest:
        raise ValueError(f"the experts would reach from sigma {lowest:.4g} to {highest:.4g}, and expected is a range that "
                         "goes up: generate samples with more steps, or set other values of sigma_min and sigma_max")
    return ExpertSchedule.equal_shares(experts, lowest, highest, levels)


def train_experts(samples: Samples, guider: Guider, bank: ExpertBank, config: DistillConfig) -> dict[str, list[float]]:
    """Train a bank on the steps that led to the samples; returns the losses by interval."""
    names = [f"sigma {each.lo:.3g} to {each.hi:.3g}" for each in bank.schedule]
    losses: dict[str, list[float]] = {name: [] for name in names}
    report = progress_with_plot(len(names) * config.steps)

    def on_step(index: int, step: int, loss: float) -> None:
        losses[names[index]].append(loss)
        report(index * config.steps + step + 1, losses)

    recipe = [samples.store.manifest, len(samples.store), guider.name, bank.fingerprint, bank.view, bank.space_name,
              bank.schedule.edges, bank.lora, config]
    folder = paths.output_folder("ppap_distillation", digest(recipe))
    load_to_train([guider.net, bank])
    with autograd():
        found = distill(guider, bank, samples.store, config, folder, on_step)
    return dict(zip(names, found, strict=True))


def new_bank(guider: Guider, schedule: ExpertSchedule, lora: LoraSpec, view: str, seed: int, space) -> ExpertBank:
    """Untrained experts of a plain guider."""
    with autograd():
        return ExpertBank(base_network(guider), schedule, lora, view, seed, space)
