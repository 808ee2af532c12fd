"""Between ComfyUI and the core: tensors, models, sampling, progress. Memory is in its own file, mathematics in the core."""
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from nodes import common_ksampler

from ..ppap_core import loaders, tinyworld
from ..ppap_core.digest import digest
from ..ppap_core.distill import DistillConfig, distill
from ..ppap_core.experts import ExpertBank, LoraSpec, base_network
from ..ppap_core.guidance import Term, guidance_shift, needs_model
from ..ppap_core.guider import Guider
from ..ppap_core.noise import ExpertSchedule
from ..ppap_core.optimise import Attempt
from ..ppap_core.plots import loss_plot
from ..ppap_core.samples import Recorder, SampleStore, Trajectories
from ..ppap_core.sampling import seeded_noise
from ..ppap_core.view import LatentSpace
from . import bad_model, folders, models
from .memory import (
    compute_type,
    load_to_train,
    make_differentiable,
    patcher_of,
    room_for,
    settle,
    with_gradients,
)
from .models import PURE_NOISE, Patcher
from .types import GuidanceTerm, Report, Samples

KEY = "ppap"
See = Callable[[Tensor, Tensor], Tensor]
SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


# Images and tensors

def image_from_comfy(image: Tensor) -> Tensor:
    """IMAGE (B, H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1], as a tensor that autograd accepts."""
    with torch.inference_mode(False):
        return image.clone()[..., :3].movedim(-1, 1) * 2 - 1


def image_to_comfy(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> IMAGE (B, H, W, 3) in [0, 1]."""
    return ((image.movedim(1, -1).float() + 1) / 2).clamp(0, 1).cpu()


@contextmanager
def autograd():
    """Leave ComfyUI's inference mode: networks and targets made in it could never be differentiated through."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def empty_conditioning() -> list:
    """The CONDITIONING of a model that takes none."""
    return [[torch.zeros(1, 1, 1), {}]]


def empty_pixels(batch: int, size: int) -> dict:
    """The LATENT of a pixel model."""
    return {"samples": torch.zeros(batch, 3, size, size)}


# Guiders' networks

def ready(guider: Guider) -> torch.device:
    """Load a guider's network to look through it right now; returns where it is."""
    loaded = patcher_of(guider.net)
    comfy.model_management.load_models_gpu([loaded])
    settle([guider.net], loaded.load_device)
    return loaded.load_device


# Guidance

class Run:
    """One sampling with guidance: its terms, what one unit of the data is, the type it computes in, and what came of it."""

    def __init__(self, terms: list[Term], sigma_data: float, compute: torch.dtype):
        self.terms, self.sigma_data, self.compute = terms, sigma_data, compute
        self.readings, self.levels, self.samples = [], set(), None
        self.attempt: Attempt | None = None  # how passes with gradients are done, once there were any

    def terms_at(self, sigma: float) -> list[Term]:
        """Where all is noise the prediction hardly depends on it, and a gradient through the model is rounding."""
        return self.terms if sigma <= PURE_NOISE else [replace(term, through=False) for term in self.terms]


def core_term(model: Patcher, term: GuidanceTerm, shape: tuple[int, ...], see: See | None) -> Term:
    """A term in the units of a model's noise and on the grid of what is sampled.

    see: how its guider sees what is diffused; None for pixels.
    """
    window = models.window_of(model.get_model_object("model_sampling"), term.start, term.end)
    ramp = models.ramp_for(model, window, term.factor_at_start, term.factor_at_end)
    mask = None if term.mask is None else models.mask_for(term.mask, shape)
    return Term(replace(term.guider, see=see), term.weight, window, ramp, mask, term.balanced, term.through)


def require_same_space(guider: Guider, model: Patcher) -> None:
    """ValueError if a guider's experts read other latents than a model diffuses."""
    kind = models.space_name(model)
    if isinstance(guider.net, ExpertBank) and guider.net.space_name != kind:
        raise ValueError(f"the experts of {guider.name} were distilled for {guider.net.space_name} models, but this model's "
                         f"kind is {kind}: use experts that were distilled for a model of this kind, or the plain guider")


def eyes_for(terms: Sequence[GuidanceTerm], model: Patcher,
             vae: comfy.sd.VAE | None) -> tuple[list[See | None], list[torch.nn.Module]]:
    """How each term's guider sees what a model diffuses, and every network that takes part in it.

    ValueError for experts of other latents.
    """
    pixels = models.is_pixel(model)
    decoder = None if vae is None or pixels else models.Decoder(vae, model)

    def eye(guider: Guider) -> See | None:
        require_same_space(guider, model)
        if pixels or guider.see:
            return guider.see
        return decoder if decoder is not None and guider.view == "denoised" else models.space_of(model).colours

    networks = {id(net): net for net in (*(term.guider.net for term in terms), decoder) if net is not None}
    return [eye(term.guider) for term in terms], list(networks.values())


def asked(terms: Sequence[GuidanceTerm], eyes: Sequence[See | None]) -> list[Guider]:
    """The guiders at work, with their eyes."""
    return [replace(term.guider, see=see) for term, see in zip(terms, eyes, strict=True) if term.weight]


def apply_guidance(model: Patcher, terms: Sequence[GuidanceTerm], max_rms: float,
                   vae: comfy.sd.VAE | None = None) -> Patcher:
    """A MODEL whose denoised predictions are shifted by all terms; every sampler and every other patch goes on working.

    vae: what guiders of the denoised view look through at latents; without it they see the latents' colours.
    """
    models.require_supported(model)
    guided, runs = model.clone(), deque(maxlen=4)
    through = any(term.through and term.weight for term in terms)
    eyes, networks = eyes_for(terms, model, vae)

    def start_run(executor, noise, *args, **kwargs):
        patched = executor.class_obj.model_patcher
        shape = models.frames_as_images(noise).shape
        runs.append(Run([core_term(patched, term, shape, see) for term, see in zip(terms, eyes, strict=True)],
                        models.sigma_data_of(patched), compute_type(patched)))
        runs[-1].samples = executor(noise, *args, **kwargs)
        return runs[-1].samples

    def after_loading(executor, guider, sigmas, *args, **kwargs):
        settle(networks, sigmas.device)
        if through:
            make_differentiable(guider)
        return executor(guider, sigmas, *args, **kwargs)

    def predict(executor, x, timestep, *args, **kwargs):
        sigma = models.ve_level(executor.class_obj.inner_model.model_sampling, timestep[0])
        if not needs_model(runs[-1].terms_at(sigma), sigma):
            return executor(x, timestep, *args, **kwargs)
        with autograd():
            point = x if x.requires_grad else x.clone().requires_grad_(True)  # a guidance below may have begun already
            attempt = runs[-1].attempt or with_gradients(executor.class_obj.inner_model)
            runs[-1].attempt = attempt
            return attempt(lambda: executor(point, timestep.clone(), *args, **kwargs).detach())

    def guide(args: dict) -> Tensor:
        denoised, run, sampling = args["denoised"], runs[-1], args["model"].model_sampling
        x, sigma = models.to_ve(sampling, args["input"].detach(), args["sigma"])
        run.levels.add(float(sigma[0]))

        def pull_back(gradient: Tensor) -> Tensor:
            gradient = models.images_as_frames(gradient, denoised)
            [found] = torch.autograd.grad(denoised, args["input"], gradient.to(denoised), retain_graph=True)
            return models.frames_as_images(found / models.to_ve(sampling, torch.ones_like(x), args["sigma"])[0])

        frames, predicted = models.frames_as_images(x), models.frames_as_images(denoised.detach())
        found = guidance_shift(run.terms_at(float(sigma[0])), frames, sigma.repeat_interleave(len(frames) // len(x)),
                               predicted, sigma_data=run.sigma_data, max_rms=max_rms or float("inf"), compute=run.compute,
                               pull_back=pull_back)
        if found is None:
            return denoised
        run.readings += found.readings
        return denoised + models.images_as_frames(found.shift, denoised)

    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, start_run)
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, room_for(asked(terms, eyes), through, KEY))
    guided.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, after_loading)
    if through:
        guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict)
    guided.set_model_sampler_post_cfg_function(guide)
    guided.set_additional_models(KEY, guided.get_additional_models_with_key(KEY) + [patcher_of(net) for net in networks])
    guided.set_attachments(KEY, (*applied(model), (terms, max_rms, vae, runs)))
    return guided


def applied(model: Patcher) -> tuple:
    """(terms, max_rms, VAE, the latest runs) of every guidance that was applied to a model."""
    return model.get_attachment(KEY) or ()


def report_of(model: Patcher, latent: dict) -> Report:
    """What guidance did while this LATENT was sampled. ValueError if it was not sampled with this MODEL."""
    names, readings, levels = [], [], set()
    for *_, runs in applied(model):
        for run in (run for run in runs if _same(run.samples, latent["samples"])):
            readings += [each._replace(term=each.term + len(names)) for each in run.readings]
            levels |= run.levels
            names += [f"{len(names) + i}: {term.guider.name}" for i, term in enumerate(run.terms, 1)]
            break
    if not names:
        raise ValueError("this latent was not sampled with this guided model: connect the model that comes out of Apply "
                         "Guidance and the latent that a sampler made with it")
    return Report(tuple(names), tuple(readings), len(levels))


def _same(samples: Tensor | None, latent: Tensor) -> bool:
    return samples is not None and samples.shape == latent.shape and torch.equal(samples.to(latent), latent)


def cfg_guider(model: Patcher, positive: list, negative: list, cfg: float) -> comfy.samplers.CFGGuider:
    """ComfyUI's own guider on a model."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def sample_guided(model, terms: Sequence[GuidanceTerm], max_rms: float, vae: comfy.sd.VAE | None, *settings: Any,
                  **more: Any) -> tuple[dict, Report]:
    """The stock KSampler on a guided model: its LATENT and the report."""
    guided = apply_guidance(model, terms, max_rms, vae)
    latent = common_ksampler(guided, *settings, **more)[0]
    return latent, report_of(guided, latent)


# Samples and distillation

def progress(total: int) -> Callable[[int, Tensor | None], None]:
    """Report(steps done, preview (1, 3, H, W) or None): moves the node's bar, and raises when the user pressed cancel."""
    bar = comfy.utils.ProgressBar(total)

    def report(done: int, preview: Tensor | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture = None if preview is None else latent_preview.preview_to_image(preview[0].movedim(0, -1))
        bar.update_absolute(done, total, picture and ("JPEG", picture, 512))
    return report


def progress_in_shares() -> Callable[[int, int], None]:
    """Report(done, all) for work whose size is only known once it has begun."""
    report = progress(1000)
    return lambda done, total: report(1000 * done // max(total, 1))


def show_text(node: Any, text: str) -> dict[str, list[str]]:
    """Show a text in the node of the page that asked; the same for the history, where programs read it."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    asked_by = getattr(node.hidden, "unique_id", None)
    if asked_by and getattr(server, "instance", None):
        server.instance.send_progress_text(text, asked_by)
    return {"text": [text]}


def about_model(model, *conditioning: list) -> dict:
    """What tells one model and its conditioning from another, for recipes."""
    sampling = model.get_model_object("model_sampling")
    guidance = [(*settings, vae is not None) for *settings, vae, _ in applied(model)]
    bad = [(*settings, each.get_key_patches()) for *settings, each in bad_model.applied(model)]
    return {"model": digest([model.get_key_patches(), model.model_options, type(sampling).__mro__[1:3], sampling.sigmas,
                             guidance, *bad]),
            "conditioning": digest(conditioning)}


def generate_samples(samples: Samples, count: int, latent: dict, model: Patcher, vae: comfy.sd.VAE | None, steps: int,
                     *settings: Any) -> None:
    """Fill the store with the model's own images and steps that led to them, as many at once as the LATENT holds.

    settings: cfg, sampler name, scheduler, positive, negative.
    """
    shape, done = comfy.sample.fix_empty_latent_channels(model, latent["samples"]).shape, len(samples.store)
    report, space, listening, recorder = progress(count * steps), samples.space, model.clone(), Recorder()

    def note(args: dict) -> Tensor:
        x, sigma = models.to_ve(args["model"].model_sampling, args["input"], args["sigma"])
        if sigma.isfinite().all():
            recorder.note(x, sigma, args["denoised"])
        return args["denoised"]

    def generate(seeds: list[int]) -> tuple[Tensor, Trajectories]:
        made, paths = zip(*(one_batch(seeds[i:i + shape[0]]) for i in range(0, len(seeds), shape[0])), strict=True)
        images = made if vae is None else [image_from_comfy(vae.decode(part)) for part in made]
        return torch.cat(images), Trajectories(*map(torch.cat, zip(*paths, strict=True)))

    def one_batch(seeds: list[int]) -> tuple[Tensor, Trajectories]:
        nonlocal done
        noise = seeded_noise(seeds, shape[1:])
        made = comfy.sample.sample(listening, noise, steps, *settings, torch.zeros_like(noise), seed=seeds[0],
                                   disable_pbar=True,
                                   callback=lambda step, x0, *_: report(done * steps + (step + 1) * len(seeds),
                                                                        space.colours(x0[:1]) if space else x0))
        done += len(seeds)
        return made, recorder.trajectories(seeds)

    listening.set_model_sampler_post_cfg_function(note)
    samples.store.fill(count, generate)


def space_to_distil(model: Patcher, vae: comfy.sd.VAE | None) -> LatentSpace | None:
    """The latents that experts will look at; None for pixels. ValueError for a model that cannot be distilled for."""
    models.require_supported(model)
    if model.get_model_object("latent_format").latent_dimensions == 3:
        raise ValueError("this model diffuses frames, and experts learn from single images so far: use the plain guider, "
                         "which judges frame by frame")
    if not models.is_pixel(model) and vae is None:
        raise ValueError("this model diffuses latents, and the untouched network looks at images: connect the model's VAE")
    return models.space_of(model)


def open_store(name: str, recipe: dict) -> SampleStore:
    """The store of a name. ValueError if it holds images of another recipe."""
    return SampleStore(folders.output_folder("ppap_samples", folders.file_name(name)), recipe)


def schedule_for(samples: Samples, experts: int, sigma_min: float, sigma_max: float) -> ExpertSchedule:
    """Noise ranges, equal in the logarithm. 0: from the lowest or to the highest of the steps that led to the samples."""
    sigmas = samples.store.sigmas
    levels = sigmas[(sigmas > 0) & (sigmas <= PURE_NOISE)].tolist()
    lowest, highest = sigma_min or min(levels, default=0.0), sigma_max or max(levels, default=0.0)
    if not 0 < lowest < highest:
        raise ValueError(f"the experts would reach from sigma {lowest:.4g} to {highest:.4g}, and expected is a range that "
                         "goes up: generate samples with more steps, or set other values of sigma_min and sigma_max")
    return ExpertSchedule.log_spaced(experts, lowest, highest)


def distil(samples: Samples, guider: Guider, bank: ExpertBank, config: DistillConfig) -> dict[str, list[float]]:
    """Train a bank on the steps that led to the samples; returns the losses by interval."""
    names = [f"sigma {each.lo:.3g} to {each.hi:.3g}" for each in bank.schedule]
    losses: dict[str, list[float]] = {name: [] for name in names}
    report, shown = progress(len(names) * config.steps), 0.0

    def on_step(index: int, step: int, loss: float) -> None:
        nonlocal shown
        losses[names[index]].append(loss)
        fresh = time.monotonic() - shown > 1
        shown = time.monotonic() if fresh else shown
        report(index * config.steps + step + 1, loss_plot(losses) if fresh else None)

    recipe = [samples.store.recipe, len(samples.store), guider.name, bank.fingerprint, bank.view, bank.space_name,
              bank.schedule.edges, vars(bank.lora), vars(config)]
    folder = folders.output_folder("ppap_distillation", digest(recipe))
    load_to_train([guider.net, bank])
    with autograd():
        found = distill(guider, bank, samples.store, config, folder, on_step)
    return dict(zip(names, found, strict=True))


def new_bank(guider: Guider, schedule: ExpertSchedule, lora: LoraSpec, view: str, seed: int, space) -> ExpertBank:
    """Untrained experts of a plain guider."""
    with autograd():
        return ExpertBank(base_network(guider), schedule, lora, view, seed, space)


# Guiders by name

_loaded: WeakValueDictionary[tuple, torch.nn.Module] = WeakValueDictionary()  # keeps no network alive


def guider_sources() -> dict[str, Callable[[str], Guider]]:
    """Everything Load Guider can load, by name, as functions of what is read of it: the bundled ones first."""
    sources = {f"tinyworld/{task}": partial(loaders.load_tinyworld, task) for task in tinyworld.TASKS}
    for folder in folders.guider_folders():
        sources.setdefault(folder.name, partial(loaders.load_guider, folder))
    return sources


def load_guider(name: str, answer: str = "own") -> Guider:
    """A guider by the name in the list; read once for as long as its network is in use. ValueError for any other name."""
    load = folders.choose(guider_sources(), name, "guider", "put its folder into models/ppap_guiders")
    key = (name, answer, *folders.guider_state(name))
    net = _loaded.get(key)
    if net is None:
        with autograd():
            guider = load(answer)
        net = _loaded[key] = guider.net
        net.loaded_as = replace(guider, net=None)  # without the network, which would then hold itself
    return replace(net.loaded_as, net=net)
