"""A MODEL whose denoised predictions are shifted by guiders, and what came of it."""
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from nodes import common_ksampler

from ...ppap_core.experts.bank import ExpertBank
from ...ppap_core.guidance.shift import guidance_shift
from ...ppap_core.guidance.terms import Term, TermRecord, needs_model
from ...ppap_core.guiders.guider import Decode, Guider
from ...ppap_core.training.loop import RunStep
from . import latents, noise_levels
from .autograd import autograd, for_gradients, make_differentiable, with_gradients
from .latents import Patcher
from .memory import compute_type, materialize_on, patcher_of, reserve_gradient_memory
from .noise_levels import PURE_NOISE

KEY = "ppap"


@dataclass(frozen=True)
class GuidanceTerm:
    """One guider's part in guidance, in the units of ComfyUI: it becomes a core `Term` once a model gives them a meaning."""

    guider: Guider
    weight: float
    start: float               # share of the sampling, as in ComfyUI's other nodes; not a share of the steps
    end: float
    factor_at_start: float     # of the weight
    factor_at_end: float
    mask: Any = None           # MASK (B|1, H, W) in [0, 1]
    balanced: bool = True      # whether the weight is a share of what is uncertain, or scales the gradient as it is
    through: bool = False      # whether the gradient in the prediction goes on through the model

    def __post_init__(self):
        if self.start > self.end:
            raise ValueError(f"steering would start at {self.start:g} and end at {self.end:g}: expected a start_percent "
                             "that is not above end_percent")



@dataclass(frozen=True)
class Report:
    """What guidance did in one run."""

    names: tuple[str, ...]     # of the terms
    records: tuple[TermRecord, ...]
    levels: int                # of noise at which the model was asked


class Run:
    """One sampling with guidance: its terms, what one unit of the data is, the type it computes in, and what came of it."""

    def __init__(self, terms: list[Term], sigma_data: float, compute: torch.dtype):
        self.terms, self.sigma_data, self.compute = terms, sigma_data, compute
        self.records, self.levels, self.samples = [], set(), None
        self.run_step: RunStep | None = None  # how passes with gradients are done, once there were any

    def terms_at(self, sigma: float) -> list[Term]:
        """Where all is noise the prediction hardly depends on it, and a gradient through the model is rounding."""
        return self.terms if sigma <= PURE_NOISE else [replace(term, through=False) for term in self.terms]


def to_core_term(model: Patcher, term: GuidanceTerm, shape: tuple[int, ...], decode: Decode | None) -> Term:
    """A term in the units of a model's noise and on the grid of what is sampled.

    decode: how its guider makes images of latents; None for pixels.
    """
    window = noise_levels.window_of(model.get_model_object("model_sampling"), term.start, term.end)
    ramp = noise_levels.ramp_for(model, window, term.factor_at_start, term.factor_at_end)
    mask = None if term.mask is None else latents.mask_for(term.mask, shape)
    return Term(replace(term.guider, decode=decode), term.weight, window, ramp, mask, term.balanced, term.through)


def require_same_space(guider: Guider, model: Patcher) -> None:
    """ValueError if a guider's experts read other latents than a model diffuses."""
    kind = latents.space_name(model)
    if isinstance(guider.net, ExpertBank) and guider.net.space_name != kind:
        raise ValueError(f"the experts of {guider.name} were distilled for {guider.net.space_name} models, but this model's "
                         f"kind is {kind}: use experts that were distilled for a model of this kind, or the plain guider")


def decoders_for(terms: Sequence[GuidanceTerm], model: Patcher,
             vae: comfy.sd.VAE | None) -> tuple[list[Decode | None], list[torch.nn.Module]]:
    """The decoder of each term's guider for what a model diffuses, and every network that takes part.

    ValueError for experts of other latents.
    """
    pixels = latents.is_pixel(model)

    def may_look_through(guider: Guider) -> bool:
        return vae is not None and not pixels and guider.decode is None and guider.view == "denoised"

    decoder = latents.Decoder(vae, model) if any(may_look_through(term.guider) for term in terms) else None

    def decoder_of(guider: Guider) -> Decode | None:
        require_same_space(guider, model)
        if pixels or guider.decode:
            return guider.decode
        return decoder if may_look_through(guider) else latents.space_of(model).colors

    networks = {id(net): net for net in (*(term.guider.net for term in terms), decoder) if net is not None}
    return [decoder_of(term.guider) for term in terms], list(networks.values())


def asked(terms: Sequence[GuidanceTerm], decoders: Sequence[Decode | None]) -> list[Guider]:
    """The guiders at work, with their decoders."""
    return [replace(term.guider, decode=decode) for term, decode in zip(terms, decoders, strict=True) if term.weight]


def apply_guidance(model: Patcher, terms: Sequence[GuidanceTerm], max_rms: float,
                   vae: comfy.sd.VAE | None = None) -> Patcher:
    """A MODEL whose denoised predictions are shifted by all terms; every sampler and every other patch goes on working.

    vae: what guiders of the denoised view look through at latents; without it they see the latents' colours.
    """
    latents.require_supported(model)
    through, runs = any(term.through and term.weight for term in terms), deque(maxlen=4)
    decoders, networks = decoders_for(terms, model, vae)
    guided = for_gradients(model) if through else model.clone()

    def start_run(executor, noise, *args, **kwargs):
        patched = executor.class_obj.model_patcher
        shape = latents.frames_as_images(noise).shape
        runs.append(Run([to_core_term(patched, term, shape, decode) for term, decode in zip(terms, decoders, strict=True)],
                        latents.sigma_data_of(patched), compute_type(patched)))
        runs[-1].samples = executor(noise, *args, **kwargs)
        return runs[-1].samples

    def after_loading(executor, guider, sigmas, *args, **kwargs):
        materialize_on(networks, sigmas.device)
        if through:
            make_differentiable(guider)
        return executor(guider, sigmas, *args, **kwargs)

    def predict(executor, x, timestep, *args, **kwargs):
        sigma = noise_levels.ve_level(executor.class_obj.inner_model.model_sampling, timestep[0])
        if not needs_model(runs[-1].terms_at(sigma), sigma):
            return executor(x, timestep, *args, **kwargs)
        with autograd():
            point = x if x.requires_grad else x.clone().requires_grad_(True)  # a guidance below may have begun already
            run_step = runs[-1].run_step or with_gradients(executor.class_obj.inner_model)
            runs[-1].run_step = run_step
            return run_step(lambda: executor(point, timestep.clone(), *args, **kwargs).detach())

    def guide(args: dict) -> Tensor:
        return apply_shift(args, runs[-1], max_rms)

    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, start_run)
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, reserve_gradient_memory(asked(terms, decoders), through, KEY))
    guided.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, after_loading)
    if through:
        guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict)
    guided.set_model_sampler_post_cfg_function(guide)
    guided.set_additional_models(KEY, guided.get_additional_models_with_key(KEY) + [patcher_of(net) for net in networks])
    guided.set_attachments(KEY, (*applied(model), (terms, max_rms, vae, runs)))
    return guided


def apply_shift(args: dict, run: Run, max_rms: float) -> Tensor:
    """The denoised prediction that a post-CFG function was given, shifted by the terms of a run."""
    denoised, sampling = args["denoised"], args["model"].model_sampling
    x, sigma = noise_levels.to_ve(sampling, args["input"].detach(), args["sigma"])
    run.levels.add(float(sigma[0]))

    def vjp(gradient: Tensor) -> Tensor:
        gradient = latents.images_as_frames(gradient, denoised)
        [found] = torch.autograd.grad(denoised, args["input"], gradient.to(denoised), retain_graph=True)
        return latents.frames_as_images(found / noise_levels.to_ve(sampling, torch.ones_like(x), args["sigma"])[0])

    frames, predicted = latents.frames_as_images(x), latents.frames_as_images(denoised.detach())
    found = guidance_shift(run.terms_at(float(sigma[0])), frames, sigma.repeat_interleave(len(frames) // len(x)), predicted,
                           sigma_data=run.sigma_data, max_rms=max_rms or float("inf"), compute=run.compute,
                           vjp=vjp)
    if found is None:
        return denoised
    run.records += found.records
    return denoised + latents.images_as_frames(found.shift, denoised)


def applied(model: Patcher) -> tuple:
    """(terms, max_rms, VAE, the latest runs) of every guidance that was applied to a model."""
    return model.get_attachment(KEY) or ()


def report_of(model: Patcher, latent: dict) -> Report:
    """What guidance did while this LATENT was sampled. ValueError if it was not sampled with this MODEL."""
    names, records, levels = [], [], set()
    for *_, runs in applied(model):
        for run in (run for run in runs if _same(run.samples, latent["samples"])):
            records += [each._replace(term=each.term + len(names)) for each in run.records]
            levels |= run.levels
            names += [f"{len(names) + i}: {term.guider.name}" for i, term in enumerate(run.terms, 1)]
            break
    if not names:
        raise ValueError("this latent was not sampled with this guided model: connect the model that comes out of Apply "
                         "Guidance and the latent that a sampler made with it")
    return Report(tuple(names), tuple(records), len(levels))


def _same(samples: Tensor | None, latent: Tensor) -> bool:
    """Whether a latent is what was sampled, also where that is not a number."""
    return samples is not None and samples.shape == latent.shape and torch.equal(samples.to(latent).nan_to_num(),
                                                                                latent.nan_to_num())


def sample_guided(model, terms: Sequence[GuidanceTerm], max_rms: float, vae: comfy.sd.VAE | None, *settings: Any,
                  **more: Any) -> tuple[dict, Report]:
    """The stock KSampler on a guided model: its LATENT and the report; denoise 0 samples nothing."""
    guided = apply_guidance(model, terms, max_rms, vae)
    latent, runs = common_ksampler(guided, *settings, **more)[0], applied(guided)[-1][-1]
    return latent, report_of(guided, latent) if runs else Report((), (), 0)
