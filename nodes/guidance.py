"""A MODEL whose denoised predictions are shifted by guiders, and what came of it."""
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.samplers
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from nodes import common_ksampler

from ..ppap_core.experts import ExpertBank
from ..ppap_core.guidance import Term, guidance_shift, needs_model
from ..ppap_core.guider import Guider
from ..ppap_core.optimise import Attempt
from . import models
from .bridge import autograd
from .memory import compute_type, for_gradients, make_differentiable, patcher_of, room_for, settle, with_gradients
from .models import PURE_NOISE, Patcher
from .types import GuidanceTerm, Report

KEY = "ppap"
See = Callable[[Tensor, Tensor], Tensor]


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

    def may_look_through(guider: Guider) -> bool:
        return vae is not None and not pixels and guider.see is None and guider.view == "denoised"

    decoder = models.Decoder(vae, model) if any(may_look_through(term.guider) for term in terms) else None

    def eye(guider: Guider) -> See | None:
        require_same_space(guider, model)
        if pixels or guider.see:
            return guider.see
        return decoder if may_look_through(guider) else models.space_of(model).colours

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
    through, runs = any(term.through and term.weight for term in terms), deque(maxlen=4)
    eyes, networks = eyes_for(terms, model, vae)
    guided = for_gradients(model) if through else model.clone()

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
        return shifted(args, runs[-1], max_rms)

    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, start_run)
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, room_for(asked(terms, eyes), through, KEY))
    guided.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, after_loading)
    if through:
        guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict)
    guided.set_model_sampler_post_cfg_function(guide)
    guided.set_additional_models(KEY, guided.get_additional_models_with_key(KEY) + [patcher_of(net) for net in networks])
    guided.set_attachments(KEY, (*applied(model), (terms, max_rms, vae, runs)))
    return guided


def shifted(args: dict, run: Run, max_rms: float) -> Tensor:
    """The denoised prediction that a post-CFG function was given, shifted by the terms of a run."""
    denoised, sampling = args["denoised"], args["model"].model_sampling
    x, sigma = models.to_ve(sampling, args["input"].detach(), args["sigma"])
    run.levels.add(float(sigma[0]))

    def pull_back(gradient: Tensor) -> Tensor:
        gradient = models.images_as_frames(gradient, denoised)
        [found] = torch.autograd.grad(denoised, args["input"], gradient.to(denoised), retain_graph=True)
        return models.frames_as_images(found / models.to_ve(sampling, torch.ones_like(x), args["sigma"])[0])

    frames, predicted = models.frames_as_images(x), models.frames_as_images(denoised.detach())
    found = guidance_shift(run.terms_at(float(sigma[0])), frames, sigma.repeat_interleave(len(frames) // len(x)), predicted,
                           sigma_data=run.sigma_data, max_rms=max_rms or float("inf"), compute=run.compute,
                           pull_back=pull_back)
    if found is None:
        return denoised
    run.readings += found.readings
    return denoised + models.images_as_frames(found.shift, denoised)


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
    """Whether a latent is what was sampled, also where that is not a number."""
    return samples is not None and samples.shape == latent.shape and torch.equal(samples.to(latent).nan_to_num(),
                                                                                latent.nan_to_num())


def cfg_guider(model: Patcher, positive: list, negative: list, cfg: float) -> comfy.samplers.CFGGuider:
    """ComfyUI's own guider on a model."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def instead_of_sampling(guider: comfy.samplers.CFGGuider, shape: tuple[int, ...], seed: int,
                        work: Callable[[Any, Tensor, dict], Any]) -> Any:
    """What work(predict, noise, extra_args) returns, done where a sampler would be at work: ComfyUI has loaded the model and
    prepared its conditioning. noise: zeros of this shape, in the place and the type that the model wants."""
    found = []

    def sampler(predict: Any, noise: Tensor, sigmas: Tensor, extra_args: dict, **unused: Any) -> Tensor:
        found.append(work(predict, noise, extra_args))
        return noise

    empty = torch.zeros(shape)
    guider.sample(empty, empty, comfy.samplers.KSAMPLER(sampler), torch.tensor([1.0, 0.0]), seed=seed)
    return found[0]


def sample_guided(model, terms: Sequence[GuidanceTerm], max_rms: float, vae: comfy.sd.VAE | None, *settings: Any,
                  **more: Any) -> tuple[dict, Report]:
    """The stock KSampler on a guided model: its LATENT and the report; denoise 0 samples nothing."""
    guided = apply_guidance(model, terms, max_rms, vae)
    latent, runs = common_ksampler(guided, *settings, **more)[0], applied(guided)[-1][-1]
    return latent, report_of(guided, latent) if runs else Report((), (), 0)
