"""Between ComfyUI and the core: tensors, models, sampling, progress. Memory is in its own file, mathematics in the core."""
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
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
from ..ppap_core.guidance import Ramp, Term, constant, guidance_shift
from ..ppap_core.guider import Guider
from ..ppap_core.noise import ExpertSchedule, NoiseInterval, flow_to_ve
from ..ppap_core.plots import loss_plot
from ..ppap_core.samples import SampleStore
from ..ppap_core.sampling import Denoiser, seeded_noise
from ..ppap_core.tinyworld.denoiser import SIGMA_DATA
from . import folders
from .memory import compute_type, patcher, patcher_of, room_for, settle
from .types import GuidanceTerm, Report, Samples

KEY = "ppap"
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


# The tiny world as a model of ComfyUI

class Pixels(comfy.latent_formats.LatentFormat):
    """Pixels in [-1, 1] as a latent."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class TinyConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a kind of model."""

    sampling_settings = {"sigma_min": tinyworld.SIGMA_MIN, "sigma_max": tinyworld.SIGMA_MAX, "sigma_data": SIGMA_DATA}
    latent_format = Pixels


class TinyDiffusion(torch.nn.Module):
    """The tiny network in the call that ComfyUI makes; there is nothing it could be conditioned on."""

    dtype = torch.float32

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, timestep: Tensor, **unused: Any) -> Tensor:
        return self.net(x, timestep)


def tinyworld_model() -> comfy.model_patcher.ModelPatcher:
    """The tiny denoiser as a MODEL: ComfyUI's own EDM preconditioning around the bare network."""
    model = comfy.model_base.BaseModel(TinyConfig({"disable_unet_model_creation": True}), comfy.model_base.ModelType.EDM)
    model.diffusion_model = TinyDiffusion(tinyworld.load_denoiser().net)
    return patcher(model)


def pixel_vae() -> comfy.sd.VAE:
    """The VAE of models whose latents are pixels already."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


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


# Models and noise levels

def require_pixels(model: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError for what guidance cannot steer yet."""
    latent, sampling = model.get_model_object("latent_format"), model.get_model_object("model_sampling")
    if latent.latent_channels != 3 or latent.latent_dimensions != 2 or latent.scale_factor != 1.0:
        raise ValueError(f"guidance of latent models is not built yet: this model's latents are {type(latent).__name__} "
                         f"with {latent.latent_channels} channels, expected plain pixels; use a pixel-space model")
    if not isinstance(sampling, (comfy.model_sampling.EPS, comfy.model_sampling.CONST)):
        raise ValueError(f"this model's sampling is {type(sampling).__name__}, expected a noise-predicting, "
                         "velocity-predicting, EDM or flow model: use another model")


def is_flow(sampling: Any) -> bool:
    return isinstance(sampling, comfy.model_sampling.CONST)


def to_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """ComfyUI's noisy state and noise level in the core's convention, x = image + sigma * noise."""
    if not is_flow(sampling):
        return x, sigma
    x, sigma = flow_to_ve(x, sigma.clamp(max=0.9999))  # a flow starts at pure noise, t = 1, which no VE level can say
    return x, sigma * getattr(sampling, "noise_scale", 1.0)


def from_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The way back."""
    if not is_flow(sampling):
        return x, sigma
    ratio = sigma / getattr(sampling, "noise_scale", 1.0)
    return x / (1 + ratio)[:, None, None, None], ratio / (1 + ratio)


def ve_level(sampling: Any, sigma: float) -> float:
    """One noise level of ComfyUI in the core's convention."""
    return to_ve(sampling, torch.ones(1, 1, 1, 1), torch.tensor([float(sigma)], dtype=torch.float64))[1].item()


def sigma_range(model: comfy.model_patcher.ModelPatcher) -> tuple[float, float]:
    """Lowest and highest noise level of a model."""
    sampling = model.get_model_object("model_sampling")
    return ve_level(sampling, sampling.sigma_min), ve_level(sampling, sampling.sigma_max)


def window_of(sampling: Any, start: float, end: float) -> NoiseInterval:
    """Shares of the sampling as noise levels: 0 takes in the highest, 1 the lowest; windows that touch do not overlap."""
    low, high = (ve_level(sampling, sampling.percent_to_sigma(share)) for share in (end, start))
    return NoiseInterval(low, float("inf") if start <= 0 else high)


def core_term(model: comfy.model_patcher.ModelPatcher, term: GuidanceTerm) -> Term:
    """A term in the units of a model's noise."""
    window, (lowest, highest) = window_of(model.get_model_object("model_sampling"), term.start, term.end), sigma_range(model)
    low, high = max(window.lo, lowest), min(window.hi, highest)
    flat = low >= high or term.factor_at_start == term.factor_at_end == 1
    ramp = constant if flat else Ramp(NoiseInterval(low, high), term.factor_at_start, term.factor_at_end)
    mask = None if term.mask is None else term.mask[:, None]
    return Term(term.guider, term.weight, window, ramp, mask)


# Guidance

class Run:
    """One sampling with guidance: its terms, the type it computes in, what the terms did, and what came out."""

    def __init__(self, terms: list[Term], compute: torch.dtype):
        self.terms, self.compute, self.readings, self.samples = terms, compute, [], None


def apply_guidance(model: comfy.model_patcher.ModelPatcher, terms: Sequence[GuidanceTerm], max_rms: float):
    """A MODEL whose denoised predictions are shifted by all terms; every sampler and every other patch goes on working."""
    require_pixels(model)
    guided, runs = model.clone(), deque(maxlen=4)
    networks = list({id(term.guider.net): term.guider.net for term in terms}.values())

    def start_run(executor, *args, **kwargs):
        model = executor.class_obj.model_patcher
        runs.append(Run([core_term(model, term) for term in terms], compute_type(model)))
        runs[-1].samples = executor(*args, **kwargs)
        return runs[-1].samples

    def after_loading(executor, guider, sigmas, *args, **kwargs):
        settle(networks, sigmas.device)
        return executor(guider, sigmas, *args, **kwargs)

    def guide(args: dict) -> Tensor:
        x, sigma = to_ve(args["model"].model_sampling, args["input"], args["sigma"])
        found = guidance_shift(runs[-1].terms, x, sigma, args["denoised"], max_rms=max_rms or float("inf"),
                               compute=runs[-1].compute)
        if found is None:
            return args["denoised"]
        runs[-1].readings += found.readings
        return args["denoised"] + found.shift

    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, start_run)
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY,
                                room_for([term.guider for term in terms if term.weight], KEY))
    guided.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, after_loading)
    guided.set_model_sampler_post_cfg_function(guide)
    guided.set_additional_models(KEY, guided.get_additional_models_with_key(KEY) + [patcher_of(net) for net in networks])
    guided.set_attachments(KEY, (*applied(model), (terms, max_rms, runs)))
    return guided


def applied(model: comfy.model_patcher.ModelPatcher) -> tuple:
    """(terms, max_rms, the latest runs) of every guidance that was applied to a model."""
    return model.get_attachment(KEY) or ()


def report_of(model: comfy.model_patcher.ModelPatcher, latent: dict) -> Report:
    """What guidance did while this LATENT was sampled. ValueError if it was not sampled with this MODEL."""
    names, readings = [], []
    for _, _, runs in applied(model):
        for run in (run for run in runs if _same(run.samples, latent["samples"])):
            readings += [each._replace(term=each.term + len(names)) for each in run.readings]
            names += [f"{len(names) + i}: {term.guider.name}" for i, term in enumerate(run.terms, 1)]
            break
    if not names:
        raise ValueError("this latent was not sampled with this guided model: connect the model that comes out of Apply "
                         "Guidance and the latent that a sampler made with it")
    return Report(tuple(names), tuple(readings))


def _same(samples: Tensor | None, latent: Tensor) -> bool:
    return samples is not None and samples.shape == latent.shape and torch.equal(samples.to(latent), latent)


def sample_guided(model, terms: Sequence[GuidanceTerm], max_rms: float, *settings: Any, **more: Any) -> tuple[dict, Report]:
    """The stock KSampler on a guided model: its LATENT and the report."""
    guided = apply_guidance(model, terms, max_rms)
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


def about_model(model, *conditioning: list) -> dict:
    """What tells one model and its conditioning from another, for recipes."""
    sampling = model.get_model_object("model_sampling")
    guidance = [settings for *settings, _ in applied(model)]
    return {"model": digest([model.get_key_patches(), model.model_options, type(sampling).__mro__[1:3], sampling.sigmas,
                             guidance]),
            "conditioning": digest(conditioning)}


def generate_samples(samples: Samples, count: int, latent: dict, *settings: Any) -> None:
    """Fill the store with the model's own images, as many at once as the LATENT holds.

    settings: steps, sampler name, scheduler.
    """
    shape, steps, done = latent["samples"].shape, settings[0], len(samples.store)
    report = progress(count * steps)

    def generate(seeds: list[int]) -> Tensor:
        return torch.cat([one_batch(seeds[i:i + shape[0]]) for i in range(0, len(seeds), shape[0])])

    def one_batch(seeds: list[int]) -> Tensor:
        nonlocal done
        noise = seeded_noise(seeds, shape[1:])
        images = comfy.sample.sample(samples.model, noise, steps, samples.cfg, *settings[1:], samples.positive,
                                     samples.negative, torch.zeros_like(noise), seed=seeds[0], disable_pbar=True,
                                     callback=lambda step, x0, *_: report(done * steps + (step + 1) * len(seeds), x0))
        done += len(seeds)
        return images

    samples.store.fill(count, generate)


def open_store(name: str, recipe: dict) -> SampleStore:
    """The store of a name. ValueError if it holds images of another recipe."""
    return SampleStore(folders.output_folder("ppap_samples", folders.file_name(name)), recipe)


def distil(samples: Samples, guider: Guider, bank: ExpertBank, config: DistillConfig) -> dict[str, list[float]]:
    """Train a bank while ComfyUI keeps model and networks loaded; returns the losses by interval."""
    names = [f"sigma {each.lo:.3g} to {each.hi:.3g}" for each in bank.schedule]
    losses: dict[str, list[float]] = {name: [] for name in names}
    report, shown = progress(len(names) * config.steps), 0.0

    def on_step(index: int, step: int, loss: float) -> None:
        nonlocal shown
        losses[names[index]].append(loss)
        fresh = time.monotonic() - shown > 1
        shown = time.monotonic() if fresh else shown
        report(index * config.steps + step + 1, loss_plot(losses) if fresh else None)

    recipe = [samples.store.recipe, len(samples.store), guider.name, bank.fingerprint, bank.view, bank.schedule.edges,
              vars(bank.lora), vars(config)]
    folder = folders.output_folder("ppap_distillation", digest(recipe))
    found = with_denoiser(samples, [guider.net, bank], config.batch,
                          lambda denoise: distill(guider, bank, samples.store, denoise, config, folder, on_step))
    return dict(zip(names, found, strict=True))


def with_denoiser(samples: Samples, networks: list[torch.nn.Module], batch: int, work: Callable[[Denoiser], Any]) -> Any:
    """work(denoise) inside a sampler, so that loading, conditioning, CFG and every patch of the model are ComfyUI's own."""
    found = []

    def sampler(model, noise, sigmas, extra_args, **unused):
        sampling = model.inner_model.inner_model.model_sampling

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.inference_mode():
                prediction = model(*from_ve(sampling, x, sigma), **extra_args)
            return prediction.clone()  # made outside of inference mode, so that autograd accepts it

        settle(networks, noise.device)
        with autograd():
            found.append(work(denoise))
        return noise

    model = samples.model.clone()
    model.set_additional_models(KEY, model.get_additional_models_with_key(KEY) + [patcher_of(net) for net in networks])
    noise = torch.zeros(batch, *samples.store.images.shape[1:])
    sigmas = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    comfy.sample.sample_custom(model, noise, samples.cfg, comfy.samplers.KSAMPLER(sampler), sigmas, samples.positive,
                               samples.negative, noise, disable_pbar=True)
    return found[0]


def new_bank(guider: Guider, schedule: ExpertSchedule, lora: LoraSpec, view: str, seed: int) -> ExpertBank:
    """Untrained experts of a plain guider."""
    with autograd():
        return ExpertBank(base_network(guider), schedule, lora, view, seed=seed)


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
