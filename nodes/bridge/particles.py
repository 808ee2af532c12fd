"""Several particles for each image in ComfyUI's samplers, drawn anew by how good the images are that the model expects."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
from torch import Tensor

from ...ppap_core.guidance.particles import Resampling, best_rows, draw, first_noise, split_copies
from ...ppap_core.guidance.prior import repeat_term
from . import latents, noise_levels
from .choosing import LatentJudge, called, can_choose, require_alone
from .guidance import GuidedModel, sample_guided
from .hooks import PARTICLES, Hooks, attach
from .latents import Patcher
from .memory import materialize_on, patcher_of
from .reports import Report, report_of
from .sampler import SamplerSettings
from .terms import GuidanceTerm

INDEX_BITS = 32  # of a key of randomness, below the seed


@dataclass
class Swarm:
    """The particles of one sampling, all images of the first particle first.

    function: of the sampler, which samples from one noise level to another. seeds: one for each image.
    """

    function: Callable[..., Tensor]
    sampling: Any  # model_sampling of the model
    judge: LatentJudge
    resampling: Resampling
    seeds: Sequence[int]
    sigma_data: float = 1.0
    numbers: list[float] = field(default_factory=list)  # mean effective number at each drawing

    def sample(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable | None = None,
               disable: bool | None = None, **options: Any) -> Tensor:
        """Sample in place of a sampler of ComfyUI's, and return the best particle of each image."""
        materialize_on(self.judge.networks, x.device)
        turns = self.resampling.turns([noise_levels.ve_level(self.sampling, level) for level in sigmas.tolist()],
                                      self.sigma_data)
        for start, end in zip([0, *turns], [*turns, len(sigmas) - 1], strict=True):
            seen = _LastStep(callback, start)
            of_segment = {**extra_args, "seed": (extra_args["seed"] + start) % 2**64}  # else its noise would come again
            x = self.function(model, x, sigmas[start:end + 1].clone(), extra_args=of_segment, callback=seen, disable=disable,
                              **options)
            if end in turns:
                denoised = model(x, x.new_full((len(x),), float(sigmas[end])), **extra_args) if seen.denoised is None \
                    else seen.denoised
                x = self._redraw(x, denoised, (float(sigmas[end - 1]), float(sigmas[end])), end)
        return x[best_rows(self._standing(x, 0.0, x))]

    def _redraw(self, x: Tensor, denoised: Tensor, levels: tuple[float, float], turn: int) -> Tensor:
        before, after = (noise_levels.ve_level(self.sampling, level) for level in levels)
        at = x.new_full((len(x),), levels[1])
        state, sigma = noise_levels.to_ve(self.sampling, x, at)
        drawn = draw(self.resampling, self._standing(state, after, denoised), self.seeds, turn)
        self.numbers.append(float(drawn.number.mean()))
        parted = split_copies(state[drawn.rows], denoised[drawn.rows], drawn, (before, after), self.seeds, turn)
        return noise_levels.from_ve(self.sampling, parted, sigma)[0]

    def _standing(self, x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
        energies = self.judge.energies(x, sigma, denoised)
        return self.judge.standing(energies.unflatten(1, (self.resampling.count, -1)).mT)

    def describe(self, guided: bool) -> str:
        """Return what became of the particles, in words."""
        count, names = self.resampling.count, ", ".join(term.guider.name for term in self.judge.terms)
        drawn = (f"drawn anew {len(self.numbers)} times, each time with an effective number of {fmean(self.numbers):.2g}"
                 if self.numbers else "never drawn anew")
        return (f"particles: {count} for each image, {'guided' if guided else 'not guided'}; {drawn}; the best one at the "
                f"end by {names}")


class _LastStep:
    """A sampler's callback that keeps the last prediction, and counts the steps of the segments before."""

    def __init__(self, callback: Callable | None, start: int):
        self.callback, self.start = callback, start
        self.denoised: Tensor | None = None

    def __call__(self, step: dict) -> None:
        self.denoised = step["denoised"]
        if self.callback:
            self.callback({**step, "i": step["i"] + self.start})


@dataclass(frozen=True)
class ParticleSampling:
    """A sampling of a MODEL with particles that terms choose.

    guides: whether the terms also guide all particles; if not, they only choose, and need no gradient. vae: as in guidance.
    ValueError where no term that has a weight can choose.
    """

    model: Patcher
    terms: Sequence[GuidanceTerm]
    settings: SamplerSettings
    resampling: Resampling
    guides: bool = True  # neutral: True
    vae: comfy.sd.VAE | None = None

    def run(self, latent: dict, max_rms: float = 0.0, live_preview: bool = False) -> tuple[dict, Report]:
        """Return the LATENT of the best particles, and the report. max_rms, live_preview: of guidance."""
        if not any(term.weight for term in self.terms):
            return sample_guided(self.model, self.terms, max_rms, self.vae, latent, self.settings, live_preview)
        terms = [repeat_term(called(term), self.resampling.count) for term in self.terms]
        if not self.guides:
            judge = LatentJudge.for_model(self.model, choosers(terms), self.vae)
            model = self.model.clone()
            attach(model, PARTICLES, Hooks(additional_models=[patcher_of(net) for net in judge.networks]))
            sampled, swarm = self._sample(model, judge, latent)
            return sampled, Report((), (), self.settings.steps, particles=swarm.describe(False))
        feature = GuidedModel(self.model, terms, max_rms, self.vae, live_preview)
        model = feature.attach(self.model)
        sampled, swarm = self._sample(model, _judge_of(feature), latent)
        report = report_of(model, sampled) if feature.finished else Report((), (), 0)
        return sampled, replace(report, particles=swarm.describe(True))

    def _sample(self, model: Patcher, judge: LatentJudge, latent: dict) -> tuple[dict, Swarm]:
        """Sample as ComfyUI's common_ksampler does, with particles; returns the LATENT and what became of them."""
        settings, count = self.settings, self.resampling.count
        start = latents.resize_empty_latent(model, latent)
        numbers = latent.get("batch_index", range(len(start)))
        seeds = [settings.seed << INDEX_BITS | int(number) for number in numbers]
        noise = comfy.sample.prepare_noise(start, settings.seed, latent.get("batch_index"))
        base = comfy.samplers.sampler_object(settings.sampler_name)
        swarm = Swarm(base.sampler_function, model.get_model_object("model_sampling"), judge, self.resampling, seeds,
                      latents.sigma_data_of(model))
        sampler = comfy.samplers.KSAMPLER(swarm.sample, base.extra_options, base.inpaint_options)
        samples = comfy.sample.sample_custom(
            model, first_noise(noise, count, seeds), settings.cfg, sampler, self._sigmas(model), settings.positive,
            settings.negative, start.repeat(count, *(1,) * (start.ndim - 1)), noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, settings.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=settings.seed)
        return {**latents.without_sizes(latent), "samples": samples[:len(start)]}, swarm  # all, where nothing was sampled

    def _sigmas(self, model: Patcher) -> Tensor:
        settings = self.settings
        return comfy.samplers.KSampler(model, settings.steps, model.load_device, settings.sampler_name, settings.scheduler,
                                       settings.denoise, model.model_options).sigmas


def choosers(terms: Sequence[GuidanceTerm]) -> list[GuidanceTerm]:
    """Return the terms that can choose and have a weight. ValueError if there are none."""
    weighed = [term for term in terms if term.weight]
    chosen = [term for term in weighed if can_choose(term.guider)]
    if not chosen:
        require_alone(weighed[0].guider)
    return chosen


def _judge_of(feature: GuidedModel) -> LatentJudge:
    chosen = choosers(feature.terms)
    decoders = {id(term): decode for term, decode in zip(feature.terms, feature.decoders, strict=True)}
    return LatentJudge(chosen, [decoders[id(term)] for term in chosen], feature.networks)
