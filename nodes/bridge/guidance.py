"""Guidance of a MODEL: its denoised predictions are shifted by guiders, and every sampling is reported."""
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from nodes import common_ksampler  # type: ignore[attr-defined]  # of ComfyUI; mypy finds this pack's own

from ...ppap_core.experts.readout import reads_features
from ...ppap_core.guidance.gradients import Prediction, energy_at
from ...ppap_core.guidance.precision import RunState
from ...ppap_core.guidance.scrutiny import blurring, is_fooled, may_be_fooled, share_taken_back
from ...ppap_core.guidance.shift import Guidance, GuidanceSettings, guidance_shift
from ...ppap_core.guidance.terms import Term, TermRecord, any_needs_vjp
from ...ppap_core.io.function_fingerprint import hashed_as
from ...ppap_core.noise import PURE_NOISE
from ...ppap_core.viz.summary import Note
from . import latents, noise_levels
from .autograd import GradientPass, for_gradients, make_differentiable, networks_of, outside_inference_mode
from .features import InnerFeatures
from .fingerprint import fingerprint_vae
from .foreign import Content, Memory
from .hooks import GUIDANCE, Feature, Hook, Hooks, RunStack, attach, features_of
from .latents import Patcher
from .live_preview import Sight, with_live_preview
from .memory import GradientMemory, compute_type, materialize_on, patcher_of
from .progress import errors_on_node
from .reports import FinishedRun, Report, report_of, samples_keys
from .sampler import SamplerSettings
from .terms import (
    GuidanceTerm,
    active_guiders,
    connected,
    decoders_for,
    decoders_of_frames,
    fingerprint_terms,
    on_grid,
    require_one_frame,
    to_core_term,
    watch_frames,
)


@dataclass
class SamplingRun:
    """State of one sampling: its terms in the model's units, the data std, the type to compute in, and records."""

    terms: list[Term]
    sigma_data: float
    compute: torch.dtype
    gradient_pass: GradientPass | None = None
    memory: Memory | None = None  # of other packs' patches, where a gradient goes through the model
    at_first: list[Content] = field(default_factory=list)  # what they remember before the first step
    records: list[TermRecord] = field(default_factory=list)
    sigmas: set[float] = field(default_factory=set)
    state: RunState = field(default_factory=RunState)
    last_seen: dict[int, Prediction] = field(default_factory=dict)  # where each term acted last, by its index
    notes: list[Note] = field(default_factory=list)
    sight: Sight | None = None  # None: what the guiders see is not shown

    def terms_at(self, sigma: float) -> list[Term]:
        """In pure noise the prediction hardly depends on it, and a gradient through the model would be rounding."""
        if sigma <= PURE_NOISE:
            return self.terms
        return [replace(term, backprop_through_model=False, weight=0.0 if reads_features(term.guider) else term.weight)
                for term in self.terms]


class GuidedModel(Feature):
    """Guidance that is attached to a MODEL.

    terms: what guides. max_rms: limit of the shift, 0 for none. vae: what guiders of the denoised view decode latents with;
    None: they look at a linear preview. live_preview: whether what the guiders see is shown while sampling.
    ValueError for a model that cannot be guided, or experts of other latents.
    """

    def __init__(self, model: Patcher, terms: Sequence[GuidanceTerm], max_rms: float, vae: comfy.sd.VAE | None = None,
                 live_preview: bool = False):
        latents.require_supported(model)
        self.live_preview = live_preview
        self.terms, self.max_rms, self.vae = tuple(terms), max_rms, vae
        self.decoders, self.networks = decoders_for(terms, model, vae)
        self.backprop_through_model = any(term.backprop_through_model and term.weight for term in terms)
        self.differentiates_model = self.backprop_through_model or any(
            reads_features(term.guider) and term.weight for term in terms)
        self.runs: RunStack[SamplingRun] = RunStack()
        self.finished: dict[str, FinishedRun] = {}  # by the digest of the samples

    def attach(self, model: Patcher) -> Patcher:
        """Clone a MODEL with this guidance on it; samplers and other patches work as before."""
        guided = for_gradients(model) if self.differentiates_model else model.clone()
        memory = GradientMemory(active_guiders(self.terms, self.decoders), self.differentiates_model, GUIDANCE)
        wrappers: dict[str, Hook] = {WrappersMP.OUTER_SAMPLE: self.on_outer_sample,
                                     WrappersMP.PREPARE_SAMPLING: memory.reserve, WrappersMP.SAMPLER_SAMPLE: self.on_sample}
        if self.backprop_through_model:
            wrappers[WrappersMP.PREDICT_NOISE] = self.on_predict
        attach(guided, GUIDANCE, Hooks(wrappers, self.post_cfg, [patcher_of(net) for net in self.networks], self))
        return guided

    def on_outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run one sampling, and keep what it did if it ends well."""
        with errors_on_node(), self.runs.running(self.new_run(executor.class_obj.model_patcher, noise)) as run:
            samples = executor(noise, *args, **kwargs)
        records = [record._replace(energy=record.energy.cpu(), rms=record.rms.cpu()) for record in run.records]
        self.finished |= dict.fromkeys(samples_keys(samples), FinishedRun(records, run.sigmas, run.notes))
        return samples

    def new_run(self, model: Patcher, noise: Tensor) -> SamplingRun:
        frames = latents.frame_count(noise)
        require_one_frame(self.terms, frames)
        decoders = decoders_of_frames(self.decoders, frames)
        shape = latents.frames_as_images(noise).shape
        terms = [to_core_term(model, term, shape, decode) for term, decode in zip(self.terms, decoders, strict=True)]
        run = SamplingRun(terms, latents.sigma_data_of(model), compute_type(model))
        return replace(run, sight=Sight(terms, run.records)) if self.live_preview else run

    def on_sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, *args: Any,
                  **kwargs: Any) -> Tensor:
        """Make what ComfyUI has loaded differentiable."""
        materialize_on(self.networks, sigmas.device)
        run = self.runs.current
        if self.differentiates_model:
            make_differentiable(guider, extra_args)
            run.gradient_pass = GradientPass(*networks_of(guider))
            run.memory = Memory(guider.inner_model.diffusion_model, guider.model_options, extra_args["model_options"])
            run.at_first = run.memory.save()
        callback = with_live_preview(callback, self, features_of(guider.model_patcher, GUIDANCE))
        samples = executor(guider, sigmas, extra_args, callback, *args, **kwargs)
        run.notes = scrutinize(run)  # here, because the networks are still loaded
        return samples

    def on_predict(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Predict with gradients where a term needs them at this noise level."""
        net, run = executor.class_obj.inner_model, self.runs.current
        sigma = noise_levels.ve_level(net.model_sampling, float(timestep[0]))
        memory, gradient_pass = run.memory, run.gradient_pass
        if memory is None or gradient_pass is None or not any_needs_vjp(run.terms_at(sigma), sigma):
            return executor(x, timestep, *args, **kwargs)
        before = memory.save()
        with outside_inference_mode():
            point = x if x.requires_grad else x.clone().requires_grad_(True)  # a guidance below may have begun already

            def attempt() -> Tensor:
                memory.restore(before)  # a cache of another pack must not answer a second attempt from the first
                return executor(point, timestep.clone(), *args, **kwargs).detach()
            try:
                return gradient_pass.run(attempt)
            finally:
                memory.detach()

    @hashed_as("apply_guidance.<locals>.guide", "max_rms")
    def post_cfg(self, args: dict) -> Tensor:
        """Shift the denoised prediction."""
        return apply_shift(args, self.runs.current, self.max_rms)

    def fingerprint(self) -> tuple:
        """Return what tells this guidance from another."""
        return fingerprint_terms(self.terms), self.max_rms, fingerprint_vae(self.vae)


def apply_guidance(model: Patcher, terms: Sequence[GuidanceTerm], max_rms: float,
                   vae: comfy.sd.VAE | None = None, live_preview: bool = False) -> Patcher:
    """Clone a MODEL with guidance on it; see `GuidedModel`."""
    return GuidedModel(model, terms, max_rms, vae, live_preview).attach(model)


def apply_shift(args: dict, run: SamplingRun, max_rms: float) -> Tensor:
    """Shift the denoised prediction by the terms of a run. args: of a post-CFG function; max_rms 0: no limit."""
    denoised, sampling = args["denoised"], args["model"].model_sampling
    x, sigma = noise_levels.to_ve(sampling, args["input"].detach(), args["sigma"])
    run.sigmas.add(float(sigma[0]))
    images, predicted = latents.frames_as_images(x), latents.frames_as_images(denoised.detach())
    prediction = Prediction(images, sigma.repeat_interleave(len(images) // len(x)), predicted, partial(_vjp, args))
    watch_frames(run.terms, predicted, latents.frame_count(denoised))
    settings = GuidanceSettings(run.sigma_data, max_rms or float("inf"), run.compute, run.state)
    guidance = _shift(args, run, prediction, settings)
    if guidance is None:
        return denoised
    run.records += guidance.records
    run.last_seen |= dict.fromkeys((record.term for record in guidance.records), replace(prediction, vjp=None))
    return denoised + latents.images_as_frames(guidance.delta, denoised)


def _shift(args: dict, run: SamplingRun, prediction: Prediction, settings: GuidanceSettings) -> Guidance | None:
    """The shift by the terms of a run, in a pass for gradients where a readout reads features of the model."""
    sigma = float(prediction.sigma[0])
    terms = [on_grid(term, prediction.x.shape) for term in run.terms_at(sigma)]
    watch = partial(run.sight.watch, sigma=sigma) if run.sight else list[Term]
    if run.gradient_pass is None or not any(reads_features(term.guider) and term.weight_at(sigma) for term in terms):
        return guidance_shift(watch(terms), prediction, settings)
    inner = InnerFeatures(args["model"], args["model_options"], args["cond"])
    features = partial(_read_whole_batch, run, inner, len(prediction.x))
    terms = [connected(term, features) if reads_features(term.guider) else term for term in terms]
    return run.gradient_pass.run(partial(guidance_shift, watch(terms), prediction, settings))


def _read_whole_batch(run: SamplingRun, inner: InnerFeatures, size: int, place: str, x: Tensor, sigma: Tensor) -> Tensor:
    if len(x) < size:  # its part of the conditioning is not known; all of the batch may still fit beside main memory
        raise torch.OutOfMemoryError("the features of a batch are read at once")
    assert run.memory
    with run.memory.kept():
        run.memory.restore(run.at_first)  # a cache of another pack would answer in the place of the features
        return inner.read(place, x, sigma)


def scrutinize(run: SamplingRun) -> list[Note]:
    """Return a note for each term whose energy fell only as far as nobody but its guider can see; one forward pass each."""
    notes = []
    for index, seen in run.last_seen.items():
        records = [record for record in run.records if record.term == index]
        if may_be_fooled(run.terms[index].guider, records):
            with suppress(torch.OutOfMemoryError):  # a sampling that went well does not fail for this
                share = _share_taken_back(run, index, seen, records)
                notes += [(index, f"seen only by the guider: a blur by one pixel takes back {share:.0%} of the fall of its "
                                  "energy; lower the weight, send the gradient through the model, use experts, or add "
                                  "another guider")] if is_fooled(share) else []
    return notes


def _share_taken_back(run: SamplingRun, index: int, seen: Prediction, records: Sequence[TermRecord]) -> float:
    guider, dtype = run.state.as_computed(index, run.terms[index].guider, run.compute)
    with torch.inference_mode(False), torch.no_grad():
        point = seen.denoised.clone()
        blurred = energy_at(blurring(guider, point), point, seen.sigma.clone(), dtype)
    return share_taken_back(records[0].energy, records[-1].energy, blurred)


def _vjp(args: dict, gradient: Tensor) -> Tensor:
    """Pull a gradient in the prediction back to the core's noisy state, both with frames as images."""
    denoised, sampling = args["denoised"], args["model"].model_sampling
    gradient = latents.images_as_frames(gradient, denoised)
    [pulled] = torch.autograd.grad(denoised, args["input"], gradient.to(denoised), retain_graph=True)
    scale = noise_levels.to_ve(sampling, torch.ones_like(args["input"]), args["sigma"])[0]
    return latents.frames_as_images(pulled / scale)


def sample_guided(model: Patcher, terms: Sequence[GuidanceTerm], max_rms: float, vae: comfy.sd.VAE | None, latent: dict,
                  settings: SamplerSettings, live_preview: bool = False) -> tuple[dict, Report]:
    """Run the stock KSampler on a guided model; returns its LATENT and the report, which is empty where denoise is 0."""
    feature = GuidedModel(model, terms, max_rms, vae, live_preview)
    guided = feature.attach(model)
    [sampled] = common_ksampler(guided, settings.seed, settings.steps, settings.cfg, settings.sampler_name,
                                settings.scheduler, settings.positive, settings.negative, latent, denoise=settings.denoise)
    return sampled, report_of(guided, sampled) if feature.finished else Report((), (), 0)
