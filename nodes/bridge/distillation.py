"""Distillation of experts: a MODEL generates images, and a guider's experts learn from the steps that led to them."""
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sample
import comfy.sd
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...ppap_core.experts.adapters import LoraSpec
from ...ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ...ppap_core.experts.checkpoint import load_bank, save_bank
from ...ppap_core.experts.distill import Distillation
from ...ppap_core.experts.estimate import Estimate, describe_seconds
from ...ppap_core.experts.examine import KnowledgeTest
from ...ppap_core.experts.knowledge import describe_knowledge, remember
from ...ppap_core.experts.lesson import DistillConfig
from ...ppap_core.experts.origin import Origin, describe_origin, remember_origin, shared_name
from ...ppap_core.experts.readout import ReadoutNetwork, with_readout
from ...ppap_core.experts.readout_file import is_readout_file, load_readout, save_readout
from ...ppap_core.experts.samples import SampleStore, held_out_count
from ...ppap_core.experts.source import Source, save_source
from ...ppap_core.experts.source import schedule_for as schedule_for_store
from ...ppap_core.experts.states import distillation_digest, state_folder
from ...ppap_core.experts.trajectories import Trajectories, TrajectoryRecorder
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.guiders.latents import LatentSpace, View
from ...ppap_core.io.hashing import digest
from ...ppap_core.rng import seeded, seeded_noise
from ...ppap_core.schedules import ExpertSchedule, read_edges
from . import latents, noise_levels, paths
from .autograd import outside_inference_mode
from .course import Course
from .fingerprint import fingerprint_model, fingerprint_vae, origin_of
from .foreign import Memory
from .frames import choose_frames, frames_to_keep, take_frames
from .hooks import SAMPLES, Feature
from .latents import Patcher
from .memory import load_to_train, module_of
from .progress import Progress, note
from .sampler import SamplerSettings
from .tensors import image_from_comfy

PROMPT = 4  # key of the draw of a prompt among those of a seed


@dataclass(frozen=True)
class Samples:
    """Generated images with steps that led to them."""

    store: SampleStore
    space: LatentSpace | None = None  # of the model's latents; None for pixels
    origin: Origin | None = None      # the model, for people


class SampleGenerator(Feature):
    """Samples images with a MODEL, and records the steps that lead to them.

    latent: an empty LATENT, whose batch is sampled at once. vae: decodes the samples; None for pixels. settings: of every
    image but its seed, since image i has seed + i; they are new images, whatever `denoise` says. Of videos, `kept` frames
    each become images, and have the seed of the first of them. draws_prompts: whether each image has one of the positive
    prompts, drawn by its seed, and not all of them.
    ValueError for a model that experts cannot be distilled for.
    """

    done: int  # images in the store
    progress: Progress
    chosen: Tensor  # frames of the videos that are being sampled, (B, kept)

    def __init__(self, model: Patcher, vae: comfy.sd.VAE | None, latent: dict, settings: SamplerSettings,
                 draws_prompts: bool = False):
        self.model, self.vae, self.settings, self.draws_prompts = model, vae, settings, draws_prompts
        self.space = space_to_distil(model, vae)
        empty = latents.resize_empty_latent(model, latent)
        self.shape, self.frames = tuple(empty.shape), latents.frame_count(empty)
        self.kept = frames_to_keep(self.frames)
        self.recorder, self.recording_model = TrajectoryRecorder(), model.clone()
        self.recording_model.set_model_sampler_post_cfg_function(self.post_cfg)
        self.recording_model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, SAMPLES, self.on_sample)

    def fill(self, name: str, count: int) -> Samples:
        """Generate until the store of a name holds `count` images. Cancelling loses only the file that is not finished.

        A store that is begun here also holds some apart, on which to measure what experts learned from the others.
        ValueError for a store that holds images of another manifest.
        """
        store = SampleStore(paths.output_folder("ppap_samples", paths.checked_file_name(name)), self.manifest())
        held_out = store.held_out if len(store) else store.hold_out()
        wanted = [(store, count)] if held_out is None else [(store, count), (held_out, held_out_count(count))]
        self.done = sum(len(part) for part, _ in wanted)
        total = sum(images for _, images in wanted) * self.settings.steps
        self.progress = Progress(total)
        self.estimate = Estimate({"pass": total - self.done * self.settings.steps}, {"pass": 0.0})
        for part, images in wanted:
            part.fill(images, self.generate, on_wait=throw_exception_if_processing_interrupted)
        if self.estimate.counts["pass"]:
            note(f"{len(store)} images; {describe_seconds(self.estimate.spent())}")
        samples = Samples(store, self.space, origin_of(self.model))
        save_source(store, Source(samples.space, samples.origin))
        return samples

    def manifest(self) -> dict:
        """Return what the images are made from, as JSON values."""
        settings = self.settings
        of_videos = {"frames": self.kept} if self.frames > 1 else {}
        prompts = {"prompts": "drawn"} if self.draws_prompts else {}
        return {**fingerprint_model(self.model, settings.positive, settings.negative), "vae": fingerprint_vae(self.vae),
                "shape": list(self.shape), "cfg": settings.cfg, "steps": settings.steps, "sampler": settings.sampler_name,
                "scheduler": settings.scheduler, "seed": settings.seed, **of_videos,
                **prompts}

    def on_sample(self, executor: Any, cfg_guider: Any, sigmas: Tensor, extra_args: dict, *args: Any,
                  **kwargs: Any) -> Tensor:
        """Sample one batch, of which caches of other packs must remember nothing when they meet the next one."""
        memory = Memory(cfg_guider.inner_model.diffusion_model, extra_args["model_options"])
        return memory.apart(executor, cfg_guider, sigmas, extra_args, *args, **kwargs)

    def post_cfg(self, args: dict) -> Tensor:
        """Record one step, and leave the prediction as it is."""
        x, sigma = noise_levels.to_ve(args["model"].model_sampling, args["input"], args["sigma"])
        if sigma.isfinite().all():
            frames, denoised = (take_frames(part, self.chosen) for part in (x, args["denoised"]))
            self.recorder.record(frames, sigma.repeat_interleave(self.kept), denoised)
        return args["denoised"]

    def generate(self, seeds: list[int]) -> tuple[Tensor, Trajectories]:
        """Return the images of some seeds, (B, 3, H, W) in [-1, 1], and the steps that led to them."""
        batch, groups = self.shape[0] * self.kept, self._by_prompt(seeds)
        batches = [self._sample([seeds[place] for place in places[i:i + batch]], positive)
                   for positive, places in groups for i in range(0, len(places), batch)]
        samples, frames, trajectories = zip(*batches, strict=True)
        images = torch.cat([self._decode(*part) for part in zip(samples, frames, strict=True)])
        order = torch.tensor([place for _, places in groups for place in places]).argsort()
        return images[order], Trajectories(*(torch.cat(part)[order] for part in zip(*trajectories, strict=True)))

    def _by_prompt(self, seeds: list[int]) -> list[tuple[list, list[int]]]:
        """Return a conditioning for each prompt, with the places of the seeds whose images have it; a video has one."""
        positive = self.settings.positive
        if not self.draws_prompts:
            return [(positive, list(range(len(seeds))))]
        chosen = [int(torch.randint(len(positive), (1,), generator=seeded(seeds[place - place % self.kept], PROMPT)))
                  for place in range(len(seeds))]
        return [([prompt], places) for number, prompt in enumerate(positive)
                if (places := [place for place, each in enumerate(chosen) if each == number])]

    def _decode(self, samples: Tensor, chosen: Tensor) -> Tensor:
        if self.vae is None:
            return take_frames(samples, chosen)
        return image_from_comfy(latents.decode_frames(self.vae, samples, chosen))

    def _sample(self, seeds: list[int], positive: list) -> tuple[Tensor, Tensor, Trajectories]:
        """Sample the images of some seeds; returns what was sampled, the frames of it that are images, and the steps."""
        first_seeds = seeds[::self.kept]
        self.chosen = choose_frames(first_seeds, self.frames, self.kept)
        settings, noise = self.settings, seeded_noise(first_seeds, self.shape[1:])
        negative = positive if settings.negative is settings.positive else settings.negative  # without, cfg has no effect
        samples = comfy.sample.sample(self.recording_model, noise, settings.steps, settings.cfg, settings.sampler_name,
                                      settings.scheduler, positive, negative, torch.zeros_like(noise),
                                      seed=seeds[0], disable_pbar=True, callback=partial(self._on_step, len(seeds)))
        self.done += len(seeds)
        return samples, self.chosen, self.recorder.trajectories(seeds)

    def _on_step(self, batch: int, step: int, denoised: Tensor, *unused: Any) -> None:
        self.estimate.done("pass", batch)
        note(f"about {describe_seconds(self.estimate.remaining())} left")
        self.progress(self.done * self.settings.steps + (step + 1) * batch, latents.preview(self.model, denoised[:1]))


def space_to_distil(model: Patcher, vae: comfy.sd.VAE | None) -> LatentSpace | None:
    """Return the latents that experts will look at; None for pixels. ValueError for a model that cannot be distilled for."""
    latents.require_supported(model)
    if not latents.diffuses_pixels(model) and vae is None:
        raise ValueError("this model diffuses latents, and the untouched network looks at images: connect the model's VAE")
    return latents.space_of(model, vae)


def schedule_for(samples: Samples, experts: int, sigma_min: float, sigma_max: float, edges: str = "") -> ExpertSchedule:
    """Divide a range of noise among experts, each with an equal share of the steps that led to the samples.

    edges: noise levels between the experts, which take the place of equal shares and of their number; empty: none.
    """
    return schedule_for_store(samples.store, experts, sigma_min, sigma_max, read_edges(edges))


class Trained(NamedTuple):
    """Result of a distillation: the losses by interval, and in words how far it went, where that is not as set."""

    losses: dict[str, list[float]]
    course: str


@dataclass(frozen=True)
class Limits:
    """Where a distillation begins and ends. Neutral: the defaults, anew and at its last step."""

    start: Guider | None = None  # with the experts to go on from; None: the plain network
    minutes: float = 0.0         # after which it ends with what is reached; 0: never


def train_experts(samples: Samples, guider: Guider, bank: ExpertBank, config: DistillConfig,
                  limits: Limits = Limits()) -> Trained:
    """Train a bank on the steps that led to the samples, resuming where it was stopped.

    What the experts know by then is kept in the bank, and the plain network is used where none is needed.
    """
    former = former_experts(limits.start) if limits.start else None
    folder = state_folder(guider, bank, partial(_folder_of, samples, guider, bank, config, former))
    load_to_train([module_of(guider), bank])
    with outside_inference_mode():
        distillation = Distillation(guider, bank, samples.store, config, folder)
        if former:
            distillation.begin_with(former)
        course = Course(distillation, KnowledgeTest(guider, bank, samples.store, throw_exception_if_processing_interrupted),
                        limits.minutes)
        losses = distillation.run(course.watch())
        remember(bank, course.knowledge)
    if samples.origin:
        remember_origin(bank, samples.origin)
    return Trained(dict(zip(course.names, losses, strict=True)), course.describe(losses))


def former_experts(guider: Guider) -> ExpertBank:
    """Return the experts of a guider. ValueError for a guider without."""
    if not isinstance(guider.net, ExpertBank):
        raise ValueError(f"{guider.name} has no experts to go on from: connect what comes out of Distill Experts or "
                         "Load Experts to start, or nothing")
    return guider.net


def _folder_of(samples: Samples, guider: Guider, bank: ExpertBank, config: DistillConfig, former: ExpertBank | None,
               fingerprint: str, lora: LoraSpec) -> Path:
    """Return the folder for the states of a distillation, whatever its network's layers are called."""
    identity = distillation_digest(guider, bank, samples.store, config, fingerprint, lora)
    if former:
        weights = [former.weights(index) for index in range(len(former.schedule))]
        identity = digest([identity, former.schedule.edges, weights])
    return paths.output_folder("ppap_distillation", identity)


def new_bank(guider: Guider, schedule: ExpertSchedule, lora: LoraSpec, view: View, seed: int,
             space: LatentSpace | None) -> ExpertBank:
    """Return untrained experts of a plain guider."""
    with outside_inference_mode():
        return ExpertBank(base_network(guider), schedule, lora, view, seed, space)


def save_experts(guider: Guider, name: str) -> Path:
    """Save a guider's experts or readout under a name, and return the file. ValueError for a guider without either."""
    file = paths.new_expert_file(name)
    if isinstance(guider.net, ReadoutNetwork):
        save_readout(file, guider.net, guider)
    elif isinstance(guider.net, ExpertBank):
        save_bank(file, guider.net, guider)
    else:
        raise ValueError(f"{guider.name} has no experts to save: connect the guider that comes out of Distill Experts")
    return file


def load_experts(guider: Guider, file: Path) -> Guider:
    """Return a plain guider with the experts or the readout in a file."""
    with outside_inference_mode():
        if is_readout_file(file):
            return with_readout(guider, load_readout(file, guider))
        return with_experts(guider, load_bank(file, guider))


def describe_saved(guider: Guider, file: Path) -> str:
    """Return what was saved and under which name to share it, which layers the experts leave as they are, and the rest."""
    texts = [f"saved {file.name}"]
    if isinstance(guider.net, ExpertBank):
        name = f"{shared_name(guider)}.safetensors"
        texts += ["" if file.name == name else f"To share it, call it {name}.", guider.net.describe_left_out()]
    return "\n".join(text for text in (*texts, describe_loaded(guider)) if text)


def describe_loaded(guider: Guider) -> str:
    """Return which models a guider's experts can guide, on what they were distilled, and what they or its readout know."""
    origin = describe_origin(guider.net) if isinstance(guider.net, ExpertBank) else ""
    return "\n".join(text for text in (origin, describe_experts(guider)) if text)


def describe_experts(guider: Guider) -> str:
    """Return what a guider's experts know or its readout reads, in words; "" where that is not known, as in old files."""
    if isinstance(guider.net, ReadoutNetwork):
        return "\n".join(filter(None, (guider.net.describe(), describe_knowledge(guider.net))))
    return describe_knowledge(guider.net) if isinstance(guider.net, ExpertBank) else ""
